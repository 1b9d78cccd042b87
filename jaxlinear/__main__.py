"""``python -m jaxlinear``: check the accuracy of this machine."""

import sys

from jaxlinear.inspect._command import main

if __name__ == "__main__":
    sys.exit(main())
