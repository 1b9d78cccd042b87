"""README's example ``examples/digits_nnx.py``, run as a user runs it.

The other examples are in `deep/test_examples.py`.
"""

import re

import numpy as np
from example import printed_by
from matplotlib.image import imread


def test_digits_are_learnt_in_mixed_precision_and_what_that_gained_is_printed(tmp_path):
    printed = printed_by(tmp_path, "digits_nnx.py")
    accuracy = re.search(r"^held-out accuracy: ([\d.]+)%$", printed, re.M)
    assert float(accuracy[1]) >= 96
    errors = re.search(r"gradient: (\S+), with Flax's layer (\S+)$", printed, re.M)
    ours, flax = map(float, errors.groups())
    assert 0 < ours < 100 * np.finfo(np.float32).eps < 2**-12 < flax
    assert "written: digits_nnx.png" in printed
    picture = imread(tmp_path / "digits_nnx.png")
    assert picture.shape[1] > 1000
    # The lowest label is not cut off: below it the picture is white.
    assert np.all(picture[-3:] == 1)
