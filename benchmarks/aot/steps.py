"""A training step of the benchmarks' GPT, of another batch and vocabulary.

With our layers, and the loss by their logits or without. The parameters are donated.
"""

import dataclasses
from typing import NamedTuple

import jax
from jax.sharding import SingleDeviceSharding

from benchmarks import model, peers
from benchmarks.results_file import OURS

PROGRAM = "gpt_step"


class Sizes(NamedTuple):
    """Sequences, and the vocabulary."""

    batch: int
    classes: int

    @property
    def gpt(self):
        fields = {"batch": self.batch, "out_features": self.classes}
        return dataclasses.replace(model.GPT_STEP, **fields)


def placed(case, device, sizes):
    """The function of a case and its arguments, on ``device``."""
    gpt = sizes.gpt
    loss = model.losses_of(gpt, {OURS: peers.ours}, case.dtype)[case.contender]
    parameters = jax.eval_shape(lambda: model.initial(gpt))
    tokens = jax.ShapeDtypeStruct((gpt.batch, gpt.tokens + 1), "int32")
    sharding = SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: a.update(sharding=sharding), (parameters, tokens)
    )
    return jax.jit(model.sgd(loss), donate_argnums=0), arguments
