"""The experiments run at small sizes, and what of them is deterministic is so."""

import json

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("optax")
pytest.importorskip("flax")

import jax
import jax.numpy as jnp

from benchmarks import outcomes, outcomes_page
from benchmarks.outcomes import CONTENDERS, EXPERIMENTS

SMALL = {
    "events": {"shape": (16, 16), "steps": 3},
    "one axis or three": {"steps": 3},
    "characters": {"shape": (2, 16), "steps": 3},
    "searches": {"shape": (8, 8), "steps": 3},
}
FLAX, OURS = CONTENDERS["Flax NNX"], CONTENDERS["jaxlinear"]


def sizes(name):
    if name in outcomes.OF_CHARACTERS:
        # Only the 64th microbatch makes an update.
        is_accumulated = name == "accumulated"
        return SMALL["characters"] | ({"steps": 64} if is_accumulated else {})
    if name in outcomes_page.SEARCHES:
        return SMALL["searches"]
    if name.startswith("sum-"):
        return {}
    return SMALL["one axis or three" if name.endswith(("axis", "axes")) else "events"]


@pytest.fixture(autouse=True)
def _ordinary_settings():
    """A user's settings, not those of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_runs_with_each_of_its_contenders(name):
    found = {
        contender: EXPERIMENTS[name](CONTENDERS[contender], 0, **sizes(name))
        for contender in outcomes.contenders(name)
    }
    assert np.isfinite([*found.values()]).all()
    if not name.startswith("sum-"):  # The rounding reached the outcome.
        assert len({*found.values()}) >= 3
    assert found["jaxlinear"] == pytest.approx(found["float32"], rel=0.05)


def test_data_and_start_are_those_of_the_seed():
    first, again, other = (
        outcomes.events(OURS, seed, shape=(8, 8), steps=2) for seed in (0, 0, 1)
    )
    assert first == again != other


# On this CPU XLA sums 32 terms of each leading axis in a row, rounding after each, and
# 256 + 1 is 256 in bfloat16.


@pytest.mark.parametrize(
    ("shape", "share"),
    [((65536,), 1), ((256, 256), 256 / 32**2), ((64, 32, 32), 256 / 32**3)],
    ids=str,
)
def test_bias_gradients_of_flax_stall_where_tokens_have_several_axes(shape, share):
    assert outcomes.equal_terms(FLAX, 0, shape) == share
    assert outcomes.equal_terms(OURS, 0, shape) == 1


def test_rare_events_are_overestimated_because_of_the_bias_gradient():
    found = {
        name: outcomes.events(layer, 0, shape=(64, 64))
        for name, layer in CONTENDERS.items()
    }
    assert found["float32"] == pytest.approx(1, abs=1e-3)
    assert found["jaxlinear"] == pytest.approx(1, abs=5e-3)
    assert found["Flax NNX, ∇B in float32"] == pytest.approx(1, abs=1e-2)
    assert found["Flax NNX"] > 1.02
    assert found["jaxlinear, ∇B in bfloat16"] > 1.02


def test_the_contenders_that_find_the_cause_exchange_only_the_bias_gradient():
    draws = np.random.default_rng(0)
    x, weight, bias, G = (
        jnp.asarray(draws.uniform(size=shape), dtype)
        for shape, dtype in (
            ((32, 32, 16), "float32"),
            ((8, 16), "float32"),
            ((8,), "float32"),
            ((32, 32, 8), "bfloat16"),
        )
    )

    def gradients(name):
        layer = CONTENDERS[name]
        vjp = jax.jit(lambda *arguments: jax.vjp(layer, *arguments)[1](G))
        return [np.asarray(g) for g in vjp(x, weight, bias)]

    ours, flax = gradients("jaxlinear"), gradients("Flax NNX")
    for (name, own), other in {
        ("Flax NNX, ∇B in float32", 0): ours,
        ("jaxlinear, ∇B in bfloat16", 1): flax,
    }.items():
        mine = (flax, ours)[own]
        found = gradients(name)
        for k, expected in enumerate([*mine[:2], other[2]]):
            np.testing.assert_array_equal(found[k], expected)
    assert not np.array_equal(ours[1], flax[1])
    assert not np.array_equal(ours[2], flax[2])


def test_the_order_of_an_h100_adds_every_term_once_and_rounds():
    rows = np.random.default_rng(0).integers(-2, 3, size=(128, 128, 8))
    G = jnp.asarray(rows, "bfloat16")
    # Integers below 256 are exact in bfloat16, and no partial sum is larger.
    small = jnp.asarray(rows % 2, "bfloat16")[:8, :16]
    exact = np.asarray(small, np.float64).sum((0, 1))
    np.testing.assert_array_equal(outcomes.summed_like_an_h100(small), exact)
    found = np.asarray(outcomes.summed_like_an_h100(G), np.float64)
    exact = rows.sum((0, 1))
    eps = float(jnp.finfo("bfloat16").eps)
    # Nine roundings on the way of each term, of sums that are at most Σ |G|.
    assert np.all(abs(found - exact) <= 18 * eps / 2 * abs(rows).sum((0, 1)))
    assert not np.array_equal(found, exact)


def test_results_have_every_experiment_contender_and_seed():
    rows = json.loads(outcomes.RESULTS.read_text())["rows"]
    found = [(row["experiment"], row["contender"], row["seed"]) for row in rows]
    assert found == [
        (name, contender, seed)
        for name in EXPERIMENTS
        for contender in outcomes.contenders(name)
        for seed in outcomes.seeds(name)
    ]
    shown = {*outcomes_page.TRAININGS, *outcomes_page.SEARCHES}
    assert {name for name in EXPERIMENTS if not name.startswith("sum-")} == shown


def test_what_readme_and_the_page_say_is_in_the_results():
    document = json.loads(outcomes.RESULTS.read_text())
    several_axes = [
        *(f"events-{a * b}" for a, b in outcomes.SIZES if a * b >= 1024),
        "events-three-axes",
    ]
    others = [name for name in outcomes_page.TRAININGS if name not in several_axes]
    others.remove("events-256")

    def percents(names, contender):
        found = (outcomes_page.percents(document, n, contender) for n in names)
        return [part for part in found if len(part)]

    flax = np.concatenate(percents(several_axes, "Flax NNX"))
    assert (round(flax.min()), round(flax.max())) == (1, 8)
    assert abs(np.concatenate(percents(several_axes, "jaxlinear"))).max() < 0.1
    for contender in outcomes.YARDSTICKS:
        assert max(abs(part.mean()) for part in percents(others, contender)) < 0.2
    on_h100 = percents(several_axes, "Flax NNX, ∇B as on an H100")
    assert abs(np.concatenate(on_h100)).max() < 1.3


def test_an_experiment_that_is_run_again_replaces_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "outcomes.json"
    path.write_text(json.dumps({"rows": [{"experiment": "sum-65536"}]}))
    monkeypatch.setattr(outcomes, "RESULTS", path)
    monkeypatch.setattr("sys.argv", ["outcomes", "sum-65536"])
    outcomes.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["contender"] for row in rows] == [*CONTENDERS]
    assert all(row["seed"] == 0 for row in rows)
