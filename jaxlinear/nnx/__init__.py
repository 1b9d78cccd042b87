"""The linear layer for Flax NNX, and the conversion of models to it and back."""

try:
    import flax.nnx as _flax  # noqa: F401
except ModuleNotFoundError as _error:
    _message = "jaxlinear.nnx needs Flax: pip install 'jaxlinear[flax]'"
    raise ModuleNotFoundError(_message, name=_error.name) from _error

from jaxlinear._flax.trees import convert_tree as convert_tree
from jaxlinear._flax.trees import dimension_numbers as dimension_numbers
from jaxlinear._flax.trees import revert_tree as revert_tree
from jaxlinear.nnx._convert import Report as Report
from jaxlinear.nnx._convert import convert as convert
from jaxlinear.nnx._convert import layers_of as layers_of
from jaxlinear.nnx._convert import revert as revert
from jaxlinear.nnx._module import Linear as Linear
