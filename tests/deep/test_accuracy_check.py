"""`python -m jaxlinear`: the accuracy of this machine, and what is said of it."""

import dataclasses
import json
import math
import subprocess
import sys

import numpy as np
import pytest

import jaxlinear
from jaxlinear.inspect import _accuracy
from jaxlinear.inspect import _command as command
from jaxlinear.inspect._accuracy import (
    DTYPES,
    QUANTITIES,
    RECIPES,
    Measurement,
    measured,
)

LAYERS = "jaxlinear", "naive", "Flax"


@pytest.fixture(scope="module")
def measurements():
    return {(m.dtype, m.quantity, m.layer, m.precision): m for m in measured()}


def test_every_dtype_quantity_layer_and_precision_is_measured(measurements):
    assert list(measurements) == [
        (dtype, quantity, layer, precision)
        for dtype in DTYPES
        for precision in ("default", "highest")
        for layer in LAYERS
        for quantity in QUANTITIES
    ] + [
        (recipe, quantity, "jaxlinear", precision)
        for recipe in RECIPES
        for precision in ("default", "highest")
        for quantity in QUANTITIES
    ]


def test_on_cpu_rounding_explains_every_error_of_ours(measurements):
    ours = [m for m in measurements.values() if m.layer == "jaxlinear"]
    assert all(m.is_explained for m in ours)
    # Nothing is exact either: something was computed, and compared.
    largest = {"float8": 6.2e-2, "int8": 1.2e-2}
    assert all(1e-9 < m.error < largest.get(m.dtype, 3e-3) for m in ours)


@pytest.mark.parametrize("name", ["float8", "int8"])
def test_products_of_worse_operands_are_not_explained(name, monkeypatch):
    per_tensor = [p._replace(scaling="per_tensor") for p in jaxlinear.INT8]
    of_e5m2 = [jaxlinear.FLOAT8.input_grad] * 2 + [jaxlinear.FLOAT8.weight_grad]
    worse = jaxlinear.Products(*(per_tensor if name == "int8" else of_e5m2))

    def linear(*arrays, products, **options):
        return jaxlinear.linear(*arrays, products=worse, **options)

    monkeypatch.setattr(_accuracy, "linear", linear)
    monkeypatch.setattr(_accuracy, "DTYPES", {})
    monkeypatch.setattr(_accuracy, "RECIPES", {name: RECIPES[name]})
    assert not all(m.is_explained for m in measured())


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_loses_is_not_explained_without_it(name, monkeypatch):
    """The bound is as narrow as it can be: without products it is exceeded."""
    recipe = {name: RECIPES[name]}
    monkeypatch.setattr(_accuracy, "DTYPES", {})
    monkeypatch.setattr(_accuracy, "RECIPES", recipe)
    monkeypatch.setattr(_accuracy, "_of_products", lambda *arguments: [0.0] * 4)
    assert "∇W" in {m.quantity for m in measured() if not m.is_explained}


@pytest.mark.parametrize(
    "cell",
    [
        ("bfloat16", "∇B", "naive"),
        ("bfloat16", "Y", "Flax"),
        ("mixed", "∇W", "Flax"),
        ("mixed", "∇B", "Flax"),
    ],
    ids=" ".join,
)
def test_sums_and_second_roundings_in_low_precision_are_not_explained(
    measurements, cell
):
    assert not measurements[*cell, "default"].is_explained


@pytest.mark.parametrize("layer", LAYERS)
def test_an_operand_with_the_bits_of_tensorfloat32_would_be_seen(layer, monkeypatch):
    # float16 has as many, and autodiff also rounds the gradient to it.
    def rounded(layer):
        return lambda x, weight, bias, dtype: layer(
            x.astype("float16").astype("float32"), weight, bias, dtype
        )

    layers = {layer: rounded(_accuracy.layers()[layer])}
    monkeypatch.setattr(_accuracy, "layers", lambda: layers)
    monkeypatch.setattr(_accuracy, "DTYPES", {"float32": DTYPES["float32"]})
    monkeypatch.setattr(_accuracy, "RECIPES", {})
    unexplained = {m.quantity for m in measured() if not m.is_explained}
    assert unexplained == {"Y", "∇X", "∇W"}


def test_not_a_number_is_not_explained():
    assert not Measurement(
        "float32", "Y", "jaxlinear", "default", math.nan, 1.0
    ).is_explained


def run(monkeypatch, found, *arguments):
    monkeypatch.setattr(command, "measured", lambda: iter(found))
    monkeypatch.setattr(command, "measured_losses", lambda: iter([]))
    monkeypatch.setattr(sys, "argv", ["jaxlinear", *arguments])
    return command.main()


FOUND = [
    Measurement("bfloat16", quantity, layer, "default", 1e-3, 2e-3)
    for layer in LAYERS
    for quantity in QUANTITIES
]


def with_error_in(layer):
    (position,) = [
        i for i, m in enumerate(FOUND) if (m.layer, m.quantity) == (layer, "∇W")
    ]
    found = list(FOUND)
    found[position] = dataclasses.replace(found[position], error=3e-3)
    return found


def test_it_fails_if_and_only_if_an_error_of_ours_is_not_explained(monkeypatch, capsys):
    assert run(monkeypatch, FOUND) == 0
    assert "!" not in capsys.readouterr().out.replace("!:", "")
    assert run(monkeypatch, with_error_in("naive")) == 0
    assert "| 1.0e-03  | 3.0e-03! |" in squeezed(capsys.readouterr().out)
    assert run(monkeypatch, with_error_in("jaxlinear")) == 1
    assert "| bfloat16 ∇W | 3.0e-03! |" in squeezed(capsys.readouterr().out)


def squeezed(text):
    """``text`` with the cells of its table as narrow as they can be."""
    while "|  " in text:
        text = text.replace("|  ", "| ")
    return text


def test_json_is_printed_or_written_and_the_heat_map_drawn(
    monkeypatch, capsys, tmp_path
):
    run(monkeypatch, FOUND, "--json")
    printed = json.loads(capsys.readouterr().out)
    file, image = tmp_path / "accuracy.json", tmp_path / "accuracy.png"
    run(monkeypatch, FOUND, "--json", str(file), "--png", str(image))
    written = json.loads(file.read_text())
    for document in (printed, written):
        assert len(document["measurements"]) == len(FOUND)
        assert document["measurements"][0]["error"] == 1e-3
        assert {"device", "date", "python", "jax", "flax"} < set(document)
    assert image.read_bytes().startswith(b"\x89PNG")


# What cannot be written, and what is said of it.
UNWRITABLE = {
    "no folder": (
        "no/such/folder/file.png",
        "the folder of no/such/folder/file.png does",
    ),
    "a folder": ("folder.png", "folder.png is a folder"),
    "read only": ("read-only.png", "read-only.png cannot be written"),
}


@pytest.mark.parametrize("option", ["--json", "--png"])
@pytest.mark.parametrize("case", UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_is_refused_first(
    monkeypatch, capsys, tmp_path, option, case
):
    name, message = case
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "read-only.png").touch()
    # Root may write to a read-only file.
    monkeypatch.setattr(command.os, "access", lambda file, _: file.suffix != ".png")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, None, option, name)
    assert f"{option}: {message}" in capsys.readouterr().err


def test_an_image_that_matplotlib_cannot_write_is_refused_first(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, None, "--png", "x.txt")
    said = capsys.readouterr().err
    assert "--png: x.txt must end in one of" in said
    assert "png" in said.split("one of")[1]


def test_without_flax_and_matplotlib_it_runs_and_says_what_is_missing():
    program = (
        "import sys; sys.modules['flax'] = sys.modules['matplotlib'] = None;"
        " sys.argv[1:] = {}; import runpy;"
        " runpy.run_module('jaxlinear', run_name='__main__')"
    )

    def result(arguments):
        command = [sys.executable, "-c", program.format(arguments)]
        return subprocess.run(command, capture_output=True, text=True)

    found = result([])
    assert found.returncode == 0
    assert "Flax is not installed" in found.stdout
    assert "naive, highest" in found.stdout
    refused = result(["--png"])
    assert refused.returncode == 2
    assert "--png needs matplotlib" in refused.stderr


def test_the_error_that_rounding_explains_is_the_one_of_a_rounded_array():
    # Only rounding: its root mean square is between u/√12 and u/√3 of the values.
    exact = np.random.default_rng(0).normal(size=10_000)
    rounded = exact.astype(np.float16).astype(np.float64)
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    explained = _accuracy._explained("float16", exact, np.abs(exact), 0)
    assert 0.5 < error / explained < 1
