"""`python -m benchmarks.aot` as someone runs it, and how it reads programs."""

import io
import json
import os
import pathlib
import subprocess
import sys

import pytest
from rich.console import Console

from benchmarks.aot import targets
from benchmarks.aot.__main__ import print_failed
from benchmarks.aot.account import account

ROOT = pathlib.Path(__file__).parents[3]
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}


def aot(*arguments):
    command = [sys.executable, "-m", "benchmarks.aot", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True
    )


def test_a_case_on_several_numbers_of_chips_is_written_and_drawn(tmp_path):
    if why := targets.missing("h100", 1):
        pytest.skip(why)
    arguments = "--target", "h100", "--chips", "8", "--chips", "16", "--layout", "fsdp"
    result = aot(*arguments, "--case", "column-mixed-plain", "--output", str(tmp_path))
    assert result.returncode == 0, result.stderr
    document = json.loads((tmp_path / "results.json").read_text())
    assert document["failed"] == []
    found = {(row["chips"], row["contender"]): row for row in document["rows"]}
    assert len(found) == 8
    # Each device has a part of the weight, (4096, 1024), and gathers the others'.
    for chips in (8, 16):
        [gathered] = (
            size
            for kind, _, size in found[chips, "naive"]["collectives"]
            if kind == "all-gather"
        )
        assert gathered == 4096 * 1024 * 2
    assert (tmp_path / "h100-column-mixed-plain-fsdp.png").exists()
    assert "column-mixed-plain" in result.stdout


def test_a_compiler_that_is_not_installed_is_said_once_and_first(tmp_path):
    if not (why := targets.absent(["h100"])):
        pytest.skip("it is installed")
    output = tmp_path / "results"
    result = aot("--target", "h100", "--output", str(output))
    assert result.returncode == 1
    assert result.stderr == f"{why}\n"
    assert why.endswith("pip install -e '.[aot]'")
    assert not output.exists()


def test_why_a_case_failed_is_printed_as_it_is():
    console = Console(file=io.StringIO(), width=200)
    failed = {"target": "h100", "chips": 8, "case": "row-mixed-bias", "axes": None}
    failed["why"] = "no [compiler] for it"
    print_failed({"failed": [failed]}, console)
    printed = console.file.getvalue()
    assert printed == "not compiled: h100 8 row-mixed-bias: no [compiler] for it\n"


def test_what_cannot_be_compiled_is_said(tmp_path):
    if why := targets.absent(["v5e"]):
        pytest.skip(why)
    arguments = "--target", "v5e", "--chips", "512", "--layout", "data"
    result = aot(*arguments, "--case", "row-mixed-plain", "--output", str(tmp_path))
    assert result.returncode == 1
    [failed] = json.loads((tmp_path / "results.json").read_text())["failed"]
    assert failed["why"] == "the compiler has no topology of more than 256 chips"


LOOP = """
%cond (p: (s32[], f32[4,8])) -> pred[] {
  %p = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(6)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %q = (s32[], f32[4,8]) parameter(0)
  %j = s32[] get-tuple-element(%q), index=0
  %two = s32[] constant(2)
  %k = s32[] add(%j, %two)
  %x = f32[4,8] get-tuple-element(%q), index=1
  %s = f32[1,8] reduce-scatter(%x), channel_id=1, replica_groups={{0,1,2,3}}
  %y = f32[4,8] all-gather(%s), channel_id=2, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %t = (s32[], f32[4,8]) tuple(%k, %y)
}

ENTRY %main (a: f32[4,8], b: f32[5,8]) -> f32[4,5] {
  %a = f32[4,8] parameter(0)
  %b = f32[5,8] parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], f32[4,8]) tuple(%zero, %a)
  %loop = (s32[], f32[4,8]) while(%start), condition=%cond, body=%body
  %z = f32[4,8] get-tuple-element(%loop), index=1
  ROOT %dot = f32[4,5] dot(%z, %b), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}
"""


def test_loops_count_by_their_steps_and_collectives_by_what_is_sent():
    found = account(LOOP)
    assert found.flops == 2 * 4 * 5 * 8
    # Three iterations, each scatters a quarter of 128 bytes and gathers it again.
    assert found.collectives == {
        ("reduce-scatter", "float32"): 96,
        ("all-gather", "float32"): 384,
    }
    assert found.wire == 3 * (3 * 32 + 128 * 3 / 4)
    assert found.kernels == 3 * 3 + 1


LIBRARY = """
ENTRY %main (a: f32[4,8], b: f32[5,8]) -> f32[4,5] {
  %a = f32[4,8] parameter(0)
  %b = f32[5,8] parameter(1)
  %g = (f32[4,5], s8[4096]) custom-call(%a, %b), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"lhs_contracting_dimensions":["1"]}}
  ROOT %y = f32[4,5] get-tuple-element(%g), index=0
}
"""


def test_a_workspace_of_a_library_is_neither_its_result_nor_its_bytes():
    found = account(LIBRARY)
    assert found.flops == 2 * 4 * 5 * 8
    assert (found.kernels, found.bytes) == (1, 4 * (32 + 40 + 20))
