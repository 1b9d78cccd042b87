"""What was compiled, and how accurate it is. Nothing of the layer imports this."""

from jaxlinear.inspect._explain import explain as explain
