"""The example program ``examples/train_digits.py``, run as a user runs it.

Linen and checkpoints (killed, damaged, of others) are in `deep/test_train_digits.py`.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "examples" / "train_digits.py"
COMMAND = [sys.executable, str(PROGRAM)]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
ENVIRONMENT.pop("XLA_FLAGS", None)  # A user has not the eight devices of these tests.
ROW = re.compile(r"(layer\d\.(?:weight|bias))\W+(\S+)\W+(\S+)\W+(\S+)")


def run(folder, *flags):
    return subprocess.run(
        [*COMMAND, *flags], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True
    )


def accuracy(stdout):
    return float(re.search(r"^held-out accuracy: ([\d.]+)%", stdout, re.M)[1])


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


def test_default_run_classifies_97_percent_and_prints_small_gradient_errors(tmp_path):
    result = run(tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\x1b" not in result.stdout
    assert len(re.findall(r"^epoch \d+/30: ", result.stdout, re.M)) == 30
    assert accuracy(result.stdout) >= 97
    rows = ROW.findall(result.stdout)
    assert len(rows) == 12
    eps = float(np.finfo(np.float32).eps)
    for _, ours, naive, difference in rows[:6]:
        assert float(ours) < 100 * eps
        assert float(naive) < 100 * eps
        assert float(difference) < 100 * eps
    for _, ours, naive, _ in rows[6:]:  # bfloat16, where the naive formula rounds.
        assert 0 < float(ours) < 100 * eps < 2**-12 < float(naive)
    assert imread(tmp_path / "train_digits.png").shape[1] > 1000


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
