"""A run of the benchmarks that is killed, and goes on."""

import json
import signal
import subprocess

from test_benchmarks import COMMAND, ENVIRONMENT, ROOT, run_benchmarks


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
