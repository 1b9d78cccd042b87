"""``examples/train_digits.py``: its flags, Linen, and checkpoints of every kind."""

import importlib.util
import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_train_digits import (
    COMMAND,
    ENVIRONMENT,
    PROGRAM,
    ROW,
    accuracy,
    run,
)

SMALL = ("--hidden", "64", "--batch-size", "128")  # An epoch of 11 steps.


def contents(folder):
    """The bytes of each file under a folder, None for each folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def assert_refused(result, *words):
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.endswith("\n")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


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


# Flags are refused before anything is computed: quickly, so in this process.


@pytest.fixture(scope="module")
def program():
    spec = importlib.util.spec_from_file_location("train_digits", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("file", "word"), [("mine", "File exists"), ("mine/notes.txt", "'notes.txt'")]
)
def test_checkpoint_flag_refuses_what_is_no_folder_for_checkpoints(
    program, tmp_path, capfd, file, word
):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(SystemExit) as refusal:
        program.open_checkpoints(str(tmp_path / "mine"))
    line = capfd.readouterr().err
    assert refusal.value.code == 2
    assert line.count("\n") == 1
    assert "--checkpoint: expected a folder" in line
    assert word in line
    assert contents(tmp_path) == before


WRONG_FLAGS = [
    (["--epochs", "-3"], "--epochs: expected an integer from 1 to 10000, got '-3'"),
    (["--epochs", "few"], "--epochs: expected an integer from 1 to 10000, got 'few'"),
    (
        ["--batch-size", "0"],
        "--batch-size: expected an integer from 1 to 1437, got '0'",
    ),
    (["--batch-size", "1438"], "expected an integer from 1 to 1437, got '1438'"),
    (["--hidden", "2.5"], "--hidden: expected an integer from 1 to 4096, got '2.5'"),
    (["--seed", "-1"], "--seed: expected an integer from 0 to 4294967295, got '-1'"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
    (["--plot", "no/a.png"], "--plot: expected a file in a folder that can be written"),
    (["--plot", "curves.doc"], "--plot: expected a .png file, got 'curves.doc'"),
    (["--plot", "."], "--plot: expected a .png file, got '.'"),
    (["--checkpoint", ""], "--checkpoint: expected a folder for checkpoints, got ''"),
]


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS)
def test_wrong_flag_is_refused_in_one_line(
    program, tmp_path, monkeypatch, capfd, flags, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train_digits.py", *flags])
    monkeypatch.setattr(program.logging, "disable", lambda: None)  # Of other tests.
    with pytest.raises(SystemExit) as refusal:
        program.main()
    printed = capfd.readouterr()
    assert refusal.value.code == 2
    assert printed.out == ""
    assert printed.err.startswith("train_digits.py: error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_flag_on_the_command_line_prints_one_line_alone(tmp_path):
    assert_refused(run(tmp_path, "--epochs", "0"), "--epochs: expected", "got '0'")
    assert list(tmp_path.iterdir()) == []
