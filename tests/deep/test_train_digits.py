"""The checkpoints of ``examples/train_digits.py``: killed, damaged and of others."""

import json
import re
import shutil
import signal
import subprocess

import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train_digits import (
    COMMAND,
    ENVIRONMENT,
    ROW,
    accuracy,
    assert_refused,
    contents,
    run,
)

SMALL = ("--hidden", "64", "--batch-size", "128")  # An epoch of 11 steps.


def saved_parameters(checkpoints, epoch):
    """Every array of a saved state, as bytes, under its path in the state."""
    state = ocp.PyTreeCheckpointer().restore(checkpoints / str(epoch) / "state")
    return {
        str(path): np.asarray(leaf).tobytes()
        for path, leaf in ocp.tree.to_flat_dict(state).items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which a small run of four epochs has left its files."""
    folder = tmp_path_factory.mktemp("finished")
    result = run(folder, *SMALL, "--epochs", "4", "--checkpoint", "saved")
    assert result.returncode == 0, result.stderr
    return folder


def test_linen_run_learns_and_reports_as_well(tmp_path):
    result = run(tmp_path, "--linen", "--epochs", "5", "--plot", "linen.png")
    assert (result.returncode, result.stderr) == (0, "")
    assert accuracy(result.stdout) >= 90
    assert len(ROW.findall(result.stdout)) == 12
    assert [path.name for path in tmp_path.iterdir()] == ["linen.png"]


# Read here, a checkpoint goes to the device that wrote it, as Orbax warns.
@pytest.mark.filterwarnings("ignore:Sharding info not provided when restoring")
def test_killed_run_resumes_to_the_parameters_of_an_uninterrupted_one(
    finished, tmp_path
):
    flags = (*SMALL, "--epochs", "4", "--checkpoint", "saved")
    with subprocess.Popen(
        [*COMMAND, *flags],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/"):
                process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = run(tmp_path, *flags)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    first = int(re.match(r"epoch (\d)/4", resumed.stdout)[1])
    assert first >= 3
    expected = saved_parameters(finished / "saved", 4)
    assert len(expected) > 18  # Six parameters, each with two moments in Adam.
    assert saved_parameters(tmp_path / "saved", 4) == expected
    curves = [
        json.loads((folder / "saved/4/progress/metadata").read_text())["history"]
        for folder in (tmp_path, finished)
    ]
    assert curves[0] == curves[1]


def test_finished_run_is_only_evaluated_again(finished):
    before = contents(finished / "saved")
    result = run(finished, *SMALL, "--epochs", "4", "--checkpoint", "saved")
    assert (result.returncode, result.stderr) == (0, "")
    assert "epoch" not in result.stdout
    assert accuracy(result.stdout) > 50
    assert contents(finished / "saved") == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--linen"], ["--linen", "expected False", "got True"]),
        (["--hidden", "32"], ["--hidden", "expected 64", "got 32"]),
        (["--batch-size", "16"], ["--batch-size", "expected 128", "got 16"]),
        (["--seed", "1"], ["--seed", "expected 0", "got 1"]),
        (["--epochs", "3"], ["--epochs", "expected at least 4", "got 3"]),
    ],
    ids=lambda value: value[0],
)
def test_checkpoints_of_another_run_are_refused(finished, flags, words):
    before = contents(finished)
    result = run(finished, *SMALL, "--checkpoint", "saved", *flags)
    assert_refused(result, *words)
    assert contents(finished) == before


@pytest.mark.parametrize("damage", ["truncated", "deleted", "other numbers"])
def test_damaged_checkpoint_is_refused(finished, tmp_path, damage):
    shutil.copytree(finished / "saved", tmp_path / "saved")
    state = tmp_path / "saved" / "4" / "state"
    data = max(state.glob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    content = data.read_bytes()
    middle = len(content) // 2
    if damage == "truncated":
        data.write_bytes(content[:middle])
    elif damage == "deleted":
        (state / "manifest.ocdbt").unlink()
    else:
        changed = bytes([content[middle] ^ 255])
        data.write_bytes(content[:middle] + changed + content[middle + 1 :])
    before = contents(tmp_path)
    result = run(tmp_path, *SMALL, "--checkpoint", "saved")
    assert_refused(result, "--checkpoint", "expected checkpoints of this program")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("file", ["7/photo.jpg", "7/progress/metadata"])
def test_numbered_folder_that_is_no_checkpoint_of_ours_is_refused(tmp_path, file):
    (tmp_path / "mine" / file).parent.mkdir(parents=True)
    (tmp_path / "mine" / file).write_text('{"mine": 1}')
    before = contents(tmp_path)
    result = run(tmp_path, "--checkpoint", "mine")
    assert_refused(result, "--checkpoint: expected checkpoints", "mine/7'")
    assert contents(tmp_path) == before
