"""The linear layer for JAX, with a custom VJP: Y = X Wᵀ + B."""

import typing as _typing
from importlib import import_module as _import_module
from importlib.metadata import version as _version

from jaxlinear._examples.functions import ExampleValues as ExampleValues
from jaxlinear._examples.functions import GradientNoise as GradientNoise
from jaxlinear._examples.functions import clipped_grad as clipped_grad
from jaxlinear._examples.functions import gradient_noise as gradient_noise
from jaxlinear._examples.functions import squared_grad_norms as squared_grad_norms
from jaxlinear._linear import linear as linear
from jaxlinear._loss.functions import LogLikelihood as LogLikelihood
from jaxlinear._loss.functions import linear_cross_entropy as linear_cross_entropy
from jaxlinear._loss.functions import linear_log_likelihood as linear_log_likelihood
from jaxlinear._plain import plain_autodiff as plain_autodiff
from jaxlinear._primitives import PRIMITIVES as PRIMITIVES
from jaxlinear._product import ALTERNATIVE_FLOAT16 as ALTERNATIVE_FLOAT16
from jaxlinear._product import FLOAT8 as FLOAT8
from jaxlinear._product import FLOAT8_E4M3 as FLOAT8_E4M3
from jaxlinear._product import INT8 as INT8
from jaxlinear._product import Product as Product
from jaxlinear._product import Products as Products
from jaxlinear._remat import save_linear_outputs as save_linear_outputs
from jaxlinear.inspect import explain as explain

__version__ = _version("jaxlinear")
"""The version of the package that is installed."""

if _typing.TYPE_CHECKING:
    from jaxlinear import linen as linen
    from jaxlinear import nnx as nnx
    from jaxlinear import torch as torch
else:

    def __getattr__(name):
        """What needs more than JAX, imported when it is used."""
        if name in ("nnx", "linen", "torch"):
            return _import_module(f"jaxlinear.{name}")
        raise AttributeError(f"module 'jaxlinear' has no attribute {name!r}")
