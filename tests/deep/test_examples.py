"""Each example, run as a user runs it, does what it says."""

import re

import jax
import numpy as np
import pytest
from example import printed_by, run
from matplotlib.image import imread

EPS = float(np.finfo(np.float32).eps)


def test_digits_are_learnt_in_mixed_precision_and_what_that_gained_is_printed(tmp_path):
    printed = printed_by(tmp_path, "digits_nnx.py")
    accuracy = r"^held-out accuracy: ([\d.]+)%, with Flax's layer ([\d.]+)%$"
    found = [*map(float, re.search(accuracy, printed, re.M).groups())]
    assert min(found) >= 96
    # Rounded gradients do not matter here: a few of the 450 images.
    assert abs(found[0] - found[1]) < 2
    errors = re.search(r"gradient: (\S+), with Flax's layer (\S+)$", printed, re.M)
    ours, flax = map(float, errors.groups())
    assert 0 < ours < 100 * EPS < 2**-12 < flax
    assert "written: digits_nnx.png" in printed
    picture = imread(tmp_path / "digits_nnx.png")
    assert picture.shape[1] > 1000
    # The lowest label is not cut off: below it the picture is white.
    assert np.all(picture[-3:] == 1)


def test_linen_classifies_digits(tmp_path):
    printed = printed_by(tmp_path, "digits_linen.py")
    assert float(re.search(r"accuracy: ([\d.]+)%", printed)[1]) > 96


def test_privacy_costs_a_few_percent(tmp_path):
    pytest.importorskip("dp_accounting")
    printed = printed_by(tmp_path, "train_private.py")
    assert re.search(r"^ε = 4\.1 at δ = 1e-05$", printed, re.M)
    found = re.search(r"private: ([\d.]+)%\n.*not private: ([\d.]+)%", printed)
    private, not_private = map(float, found.groups())
    assert 90 < private < not_private
    assert not_private > 95


def test_gradients_of_the_three_layers_have_the_errors_that_are_claimed(tmp_path):
    printed = printed_by(tmp_path, "gradient_accuracy.py")
    rows = re.findall(r"│ (\S[^│]*?) +│ (\S+) +│ (\S+) +│ (\S+) +│", printed)
    assert [name for name, *_ in rows] == 2 * ["jaxlinear", "x @ W.T + b", "nnx.Linear"]
    errors = [[float(error) for error in row] for _, *row in rows]
    assert max(errors[0] + errors[3]) < 10 * EPS  # Ours, in either precision.
    # In mixed precision Flax rounds the weight's gradient; both round the bias's.
    assert errors[5][1] > 2**-12
    assert min(errors[4][2], errors[5][2]) > 2**-12
    assert imread(tmp_path / "gradient_accuracy.png").shape[1] > 1000


def test_adapters_learn_and_what_frozen_weights_would_need_is_not_kept(tmp_path):
    printed = printed_by(tmp_path, "finetune_lora.py")
    before, after = re.search(
        r"([\d.]+)% right before, ([\d.]+)% after", printed
    ).groups()
    assert float(before) < 20
    assert float(after) > 80
    (_, everything), (_, adapters) = [
        [int(n.replace(",", "")) for n in found]
        for found in re.findall(r"([\d,]+) parameters, ([\d,]+) bytes", printed)
    ]
    # Of the frozen layers the inputs, 1347 images of 512 values in bfloat16, without
    # what the adapters keep instead.
    assert everything - adapters == 2 * 1347 * 512 * 2 - (1347 * 8 + 512 * 8) * 2


def test_layers_split_over_eight_devices_learn_what_one_device_does(tmp_path):
    printed = printed_by(tmp_path, "tensor_parallel.py")
    held = dict(
        re.findall(r"^(\w+\.\w+) .* each device holds (\(.*\))$", printed, re.M)
    )
    assert held == {
        "column.weight": "(32, 64)",
        "column.bias": "(32,)",
        "row.weight": "(10, 32)",
        "row.bias": "(10,)",
    }
    # The output of the row-parallel layer, ∇X of the column-parallel one, and for each
    # parameter its gradient, of which a device has its own part: all in one table.
    sent = 256 * 10 + 256 * 64 + 32 * 64 + 32 + 10 * 32 + 10
    assert re.search(rf"\| all-reduce \| +float32 \| +6 \| +{4 * sent:,} \|", printed)
    assert float(re.search(r"at most (\S+) from", printed)[1]) < 100 * EPS


OLD = jax.__version_info__ < (0, 11, 1)


@pytest.mark.skipif(OLD, reason="`jax.vjp` has no `saveable_args`")
def test_a_pipeline_holds_no_weight_and_its_gradients_have_the_plain_programs_bits(
    tmp_path,
):
    printed = printed_by(tmp_path, "pipeline.py")
    found = re.findall(
        r"^(\w+, .*): ([\d,]+) bytes held; same bits: (.*)$", printed, re.M
    )
    held = {name: int(size.replace(",", "")) for name, size, _ in found}
    # Four microbatches; two layers keep their input and the result of tanh.
    array, weights = 4 * 2 * 32 * 512, 4 * 2 * 512**2
    assert held == {
        "float32, jaxlinear": 8 * array,
        "float32, jaxlinear checkpointed": 8 * array,
        "float32, x @ w.T": 8 * array + 4 * weights,
        "float32, x @ w.T checkpointed": 8 * array,
        "bfloat16, jaxlinear": 4 * array + 2 * weights,
        "bfloat16, jaxlinear checkpointed": 6 * array,
        "bfloat16, x @ w.T": 4 * array + 2 * weights,
        "bfloat16, x @ w.T checkpointed": 6 * array,
    }
    # A CPU without bfloat16 instructions rounds G only under jax.checkpoint.
    same = {name for name, _, same in found if same == "True"}
    assert same >= {*list(held)[:2], "bfloat16, jaxlinear"}


@pytest.mark.skipif(not OLD, reason="`jax.vjp` has `saveable_args`")
def test_the_pipeline_says_which_jax_it_needs(tmp_path):
    result = run(tmp_path, "pipeline.py")
    assert (result.returncode, result.stdout) == (1, "")
    assert "`saveable_args` needs JAX 0.11.1, not 0.10" in result.stderr


def test_losses_in_8_bits_are_those_in_bfloat16(tmp_path):
    printed = printed_by(tmp_path, "train_eight_bits.py", "--steps", "80")
    found = re.findall(
        r"^(\w+), seed (\d): loss (\S+), held-out loss (\S+)$", printed, re.M
    )
    losses = {(recipe, seed): (float(a), float(b)) for recipe, seed, a, b in found}
    assert len(losses) == 9
    for (recipe, seed), pair in losses.items():
        reference = losses["bfloat16", seed]
        assert max(pair) < 1  # Something was learnt: a guess costs ln 10 = 2.3.
        if recipe != "bfloat16":
            assert pair != reference  # 8 bits were used.
            assert max(a - b for a, b in zip(pair, reference, strict=True)) < 0.02
    assert imread(tmp_path / "eight-bits.png").shape[1] > 500


def test_too_few_steps_are_refused(tmp_path):
    result = run(tmp_path, "train_eight_bits.py", "--steps", "9")
    assert result.returncode == 2
    assert "argument --steps: must be at least 10, got 9" in result.stderr
    assert not any(tmp_path.iterdir())
