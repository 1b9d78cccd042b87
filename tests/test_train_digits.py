"""``examples/train_digits.py``, run as a user runs it."""

import pathlib
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

ocp = pytest.importorskip("orbax.checkpoint")

PROGRAM = pathlib.Path(__file__).parent.parent / "examples" / "train_digits.py"


def start(folder, *flags):
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), *map(str, flags)],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(folder, *flags):
    """The exit status, the standard output and the standard error."""
    process = start(folder, *flags)
    output, errors = process.communicate()
    return process.returncode, output, errors


def contents(folder):
    """The bytes of every file below ``folder``."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def saved_state(folder, epoch):
    with ocp.CheckpointManager(folder) as manager:
        restored = ocp.args.Composite(state=ocp.args.StandardRestore())
        return manager.restore(epoch, args=restored)["state"]


def assert_refused(result, message):
    status, output, errors = result
    assert status == 2
    assert output == ""
    assert re.fullmatch(f"train_digits.py: error: {message}\n", errors), errors


def test_the_trained_model_is_right_on_97_percent_of_the_held_out_digits(tmp_path):
    status, output, errors = run(tmp_path)
    assert status == 0, errors
    assert "\x1b" not in output  # Plain lines where there is no terminal.
    assert "epoch 30/30" in output
    assert float(re.search(r"held-out accuracy: ([\d.]+)%", output)[1]) >= 97
    assert (tmp_path / "train_digits.png").read_bytes().startswith(b"\x89PNG")

    rows = re.findall(r"(layer\d\.\w+) +│ +(\S+) │ +(\S+) │ +(\S+)", output)
    errors = [(float(ours), float(naive)) for _, ours, naive, _ in rows]
    assert len(rows) == 12
    for ours, naive in errors[:6]:  # In float32 the same sums in another order.
        assert ours < 1e-5
        assert naive < 1e-5
    for ours, naive in errors[6:]:  # In bfloat16 autodiff rounds to it.
        assert ours < 1e-5
        assert naive > 5e-4


def test_linen_trains_the_same_model(tmp_path):
    status, output, errors = run(
        tmp_path, "--linen", "--epochs", 8, "--plot", "linen.png"
    )
    assert status == 0, errors
    assert float(re.search(r"held-out accuracy: ([\d.]+)%", output)[1]) >= 90
    assert (tmp_path / "linen.png").exists()


def test_a_killed_run_goes_on_from_its_last_epoch_to_the_same_parameters(tmp_path):
    flags = ("--epochs", 6, "--hidden", 32, "--checkpoint")
    killed = start(tmp_path, *flags, "killed")
    for line in killed.stdout:
        if line.startswith("epoch 3/6"):
            killed.send_signal(signal.SIGKILL)
            break
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL

    status, output, errors = run(tmp_path, *flags, "killed")
    assert status == 0, errors
    resumed_at = int(re.search(r"epoch (\d)/6", output)[1])
    assert resumed_at >= 4  # The third epoch was saved before it was reported.
    status, _, errors = run(tmp_path, *flags, "whole")
    assert status == 0, errors
    states = (saved_state(tmp_path / name, 6) for name in ("killed", "whole"))
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_a_finished_run_is_judged_again_without_training(tmp_path):
    flags = ("--epochs", 2, "--hidden", 16, "--checkpoint", "run")
    _, first, _ = run(tmp_path, *flags)
    status, second, errors = run(tmp_path, *flags)
    assert status == 0, errors
    assert "epoch" not in second
    assert first.endswith(second)


BAD_FLAGS = {
    "negative epochs": (
        ["--epochs", "-1"],
        r"--epochs: expected an integer from 1 to 10000, got '-1'",
    ),
    "empty batch": (
        ["--batch-size", "0"],
        r"--batch-size: expected an integer from 1 to 1437, got '0'",
    ),
    "no number": (
        ["--hidden", "wide"],
        r"--hidden: expected an integer from 1 to 4096, got 'wide'",
    ),
    "unknown flag": (["--layers", "3"], r"unrecognized arguments: --layers 3"),
    "no folder for the plot": (
        ["--plot", "nowhere/a.png"],
        r"--plot: expected a file in a folder that can be written to, got"
        r" 'nowhere/a.png'",
    ),
    "folder as the plot": (["--plot", "."], r"--plot: expected a .png file, got '.'"),
}


@pytest.mark.parametrize("refused", BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_a_bad_flag_is_refused_in_one_line(tmp_path, refused):
    flags, message = refused
    assert_refused(run(tmp_path, *flags), message)
    assert contents(tmp_path) == {}


def test_a_folder_without_checkpoints_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("Years of work.")
    before = contents(tmp_path)
    message = (
        r"--checkpoint: expected a folder for checkpoints, got 'thesis', which holds"
        r" 'chapter.tex' and no checkpoint"
    )
    assert_refused(run(tmp_path, "--checkpoint", "thesis"), message)
    assert contents(tmp_path) == before


def test_a_file_in_the_place_of_the_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "notes").write_text("Years of work.")
    message = r"--checkpoint: expected a folder for checkpoints, got 'notes': .*"
    assert_refused(run(tmp_path, "--checkpoint", "notes"), message)
    assert (tmp_path / "notes").read_text() == "Years of work."


def test_the_checkpoint_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    flags = ("--epochs", 1, "--hidden", 16, "--checkpoint", "run")
    assert run(tmp_path, *flags)[0] == 0
    before = contents(tmp_path)
    others = {
        r"--hidden: expected 16, .*, got 8": ("--hidden", 8),
        r"--linen: expected False, .*, got True": ("--linen",),
        r"--seed: expected 0, .*, got 7": ("--seed", 7),
    }
    for message, other in others.items():
        assert_refused(run(tmp_path, *flags, *other), message)
    assert contents(tmp_path) == before


def test_a_damaged_or_foreign_checkpoint_is_refused_and_left_as_it_is(tmp_path):
    with ocp.CheckpointManager(tmp_path / "foreign") as manager:
        manager.save(3, args=ocp.args.StandardSave({"somebody's": np.ones(3)}))
        manager.wait_until_finished()
    flags = ("--epochs", 1, "--hidden", 16, "--checkpoint")
    assert run(tmp_path, *flags, "damaged")[0] == 0
    for file in (tmp_path / "damaged" / "1" / "state").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    before = contents(tmp_path)
    message = (
        r"--checkpoint: expected checkpoints of this program, got .* be restored: .*"
    )
    for folder in ("foreign", "damaged"):
        assert_refused(run(tmp_path, *flags, folder), message)
    assert contents(tmp_path) == before
