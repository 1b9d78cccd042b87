"""The linear layer for JAX, with a custom VJP: Y = X Wᵀ + B."""

from jaxlinear._explain import explain as explain
from jaxlinear._linear import linear as linear
from jaxlinear._linear import save_linear_outputs as save_linear_outputs
from jaxlinear._plain import plain_autodiff as plain_autodiff
from jaxlinear._precision import Precision as Precision
