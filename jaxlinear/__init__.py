"""The linear layer for JAX, with a custom VJP: Y = X Wᵀ + B."""

from jaxlinear._linear import linear as linear
