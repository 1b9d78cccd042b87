"""The whole model of the benchmarks, and a run that is killed and goes on."""

import json
import signal
import subprocess

import jax
import jax.numpy as jnp
import pytest
from test_benchmarks import COMMAND, ENVIRONMENT, ROOT, TINY, run_benchmarks

from benchmarks.model import model_programs


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    chosen = "--only", "growth 256", "--only", "growth 1024", "--dtype", "float32"
    chosen += "--output", str(tmp_path)
    run = subprocess.Popen(
        [*COMMAND, *chosen],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert run.stdout is not None
    with run.stdout:
        assert any("growth 256, float32" in line for line in run.stdout)
        run.send_signal(signal.SIGKILL)
        run.wait()
    path = tmp_path / "results.json"
    document = json.loads(path.read_text())
    assert not document["complete"]
    document["results"][0]["median_s"] = 1234.5
    path.write_text(json.dumps(document))
    again = run_benchmarks(*chosen, "--resume")
    assert again.returncode == 0, again.stderr
    assert "growth 256, float32" not in again.stdout
    document = json.loads(path.read_text())
    assert document["complete"]
    assert document["results"][0]["median_s"] == 1234.5
    cells = [(row["workload"], row["library"]) for row in document["results"]]
    assert len(cells) == len(set(cells))
    assert ("growth 1024", "jaxlinear") in cells
    assert [*tmp_path.glob(".results*")] == []


@pytest.mark.parametrize("dtype", ["float32", "mixed"])
def test_a_step_of_a_whole_model_is_checked_and_has_its_bytes(dtype):
    compute_dtype = {"float32": "float32", "mixed": "bfloat16"}[dtype]
    allowed = jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard")
    with allowed[0], allowed[1]:
        checked = model_programs(TINY, dtype, compute_dtype, jax.devices()[0])
        losses = [program.call()[0] for program in checked[0].values()]
    programs, errors, flops, least_bytes = checked
    assert {"jaxlinear", "naive formula", "Flax NNX"} <= programs.keys()
    assert errors.keys() == programs.keys()
    linear = 12 * 32**2 + 32 * 64
    assert (flops, least_bytes) == (6 * linear * 16, 8 * linear)
    assert all(map(jnp.isfinite, losses))
    for program in programs.values():
        assert 0 < program.temporary_bytes < program.peak_bytes
