"""`python -m jaxlinear`: the accuracy of this machine, and what is said of it."""

import dataclasses
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from jax import lax

import jaxlinear
from jaxlinear._op import formulas
from jaxlinear.inspect import _accuracy, _loss_accuracy
from jaxlinear.inspect import _command as command
from jaxlinear.inspect._accuracy import (
    DTYPES,
    QUANTITIES,
    RECIPES,
    Measurement,
    measured,
)
from jaxlinear.inspect._loss_accuracy import measured_losses
from jaxlinear.inspect._rounding import rounding

LAYERS = "jaxlinear", "naive", "Flax"
CPU = SimpleNamespace(platform="cpu")
TPU = SimpleNamespace(platform="tpu", device_kind="TPU v5 lite")


def gpu(capability):
    return SimpleNamespace(
        platform="gpu", device_kind="a GPU", compute_capability=capability
    )


@pytest.fixture(scope="module")
def measurements():
    return {(m.dtype, m.quantity, m.layer, m.precision): m for m in measured(CPU)}


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
    assert not all(m.is_explained for m in measured(CPU))


@pytest.mark.parametrize("name", RECIPES)
def test_what_a_recipe_loses_is_not_explained_without_it(name, monkeypatch):
    """The bound is as narrow as it can be: without products it is exceeded."""
    recipe = {name: RECIPES[name]}
    monkeypatch.setattr(_accuracy, "DTYPES", {})
    monkeypatch.setattr(_accuracy, "RECIPES", recipe)
    monkeypatch.setattr(_accuracy, "_of_products", lambda *arguments: [0.0] * 4)
    assert "∇W" in {m.quantity for m in measured(CPU) if not m.is_explained}


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
    unexplained = {m.quantity for m in measured(CPU) if not m.is_explained}
    assert unexplained == {"Y", "∇X", "∇W"}


def test_the_default_precision_is_that_of_the_device():
    found = {
        name: rounding(device, "float32").operands
        for name, device in {
            "CPU": CPU,
            "TPU": TPU,
            "V100": gpu("7.0"),
            "A100": gpu("8.0"),
            "B200": gpu("10.0"),
            "MI300": gpu("gfx942"),
        }.items()
    }
    assert found == {
        "CPU": "float32",
        "TPU": "bfloat16",
        "V100": "float32",
        "A100": "TensorFloat32",
        "B200": "TensorFloat32",
        "MI300": "float32",
    }
    for device in (CPU, TPU, gpu("9.0")):
        assert rounding(device, "float32", "highest").roundoff == 0
        assert rounding(device, "bfloat16").roundoff == 0
    assert rounding(TPU, "float16").operands == "bfloat16"
    assert rounding(gpu("9.0"), "float16").operands == "float16"


# How the operands of a float32 product are rounded.
FORMATS = {
    "TensorFloat32": lambda a: lax.reduce_precision(a, 8, 10),
    "TensorFloat32, truncated": lambda a: lax.bitcast_convert_type(
        lax.bitcast_convert_type(a, "int32") & ~0x1FFF, "float32"
    ),
    "bfloat16": lambda a: lax.reduce_precision(a, 8, 7),
}


def unexplained(device, monkeypatch, **kinds):
    """What of ours is not explained on ``device``: (dtype, quantity, precision)."""
    ours = {"jaxlinear": _accuracy.layers()["jaxlinear"]}
    for module in (_accuracy, _loss_accuracy):
        monkeypatch.setattr(module, "DTYPES", kinds.get("dtypes", DTYPES))
        monkeypatch.setattr(module, "layers", lambda: ours)
    monkeypatch.setattr(_accuracy, "RECIPES", kinds.get("recipes", RECIPES))
    found = [*measured(device), *measured_losses(device)]
    return {(m.dtype, m.quantity, m.precision) for m in found if not m.is_explained}


def products(dtype, precision):
    return {(dtype, quantity, precision) for quantity in ("Y", "∇X", "∇W")}


AT_HIGHEST = products("float32", "highest")
# The bound of the loss itself is that of its worst logits.
AT_BOTH = AT_HIGHEST | {
    *products("float32", "default"),
    *(("float32", f"loss {of}", "default") for of in ("∇X", "∇W", "∇B")),
}
CASES = {
    "on a GPU": ("TensorFloat32", gpu("9.0"), AT_HIGHEST),
    "on a GPU, truncated": ("TensorFloat32, truncated", gpu("9.0"), AT_HIGHEST),
    "on a TPU": ("bfloat16", TPU, AT_HIGHEST),
    "too few bits on a GPU": ("bfloat16", gpu("9.0"), AT_BOTH),
    "on a GPU without": ("TensorFloat32", gpu("7.5"), AT_BOTH),
    "on a CPU": ("TensorFloat32", CPU, AT_BOTH),
}


@pytest.mark.parametrize(
    ("format", "device", "expected"), CASES.values(), ids=CASES.keys()
)
def test_operands_may_lose_the_bits_that_the_device_was_asked_to_drop(
    format, device, expected, replace, monkeypatch
):
    multiply, rounded = formulas.multiply_arrays, FORMATS[format]

    def of_rounded(a, b, *others):
        if a.dtype == "float32":
            a, b = rounded(a), rounded(b)
        return multiply(a, b, *others)

    replace(formulas, "multiply_arrays", of_rounded)
    kinds = {"dtypes": {"float32": DTYPES["float32"]}, "recipes": {}}
    assert unexplained(device, monkeypatch, **kinds) == expected


def test_a_tpu_may_multiply_float16_in_bfloat16(replace, monkeypatch):
    multiply, rounded = formulas.multiply_arrays, FORMATS["bfloat16"]

    def of_rounded(a, b, *others):
        if a.dtype == "float16":
            a, b = (rounded(o.astype("float32")).astype("float16") for o in (a, b))
        return multiply(a, b, *others)

    replace(formulas, "multiply_arrays", of_rounded)
    kinds = {"dtypes": {"float16": DTYPES["float16"]}, "recipes": {}}
    assert unexplained(TPU, monkeypatch, **kinds) == products("float16", "highest")


def test_y_may_be_rounded_before_the_bias_on_gpus_only(replace, monkeypatch):
    def as_on_gpus(self, *operands):
        return self.on("cuda", True, *operands)

    replace(formulas._ForwardProduct, "plain", as_on_gpus)
    assert not unexplained(gpu("9.0"), monkeypatch)
    in_bfloat16 = {
        (dtype, "Y", precision)
        for dtype in ("bfloat16", "mixed", "mixed, ∇W sent in bfloat16")
        for precision in ("default", "highest")
    }
    assert unexplained(CPU, monkeypatch) == in_bfloat16


def test_not_a_number_is_not_explained():
    assert not Measurement(
        "float32", "Y", "jaxlinear", "default", math.nan, 1.0
    ).is_explained


def run(monkeypatch, found, *arguments):
    monkeypatch.setattr(command, "measured", lambda device: iter(found))
    monkeypatch.setattr(command, "measured_losses", lambda device: iter([]))
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


@pytest.mark.parametrize(
    ("device", "said", "in_json"),
    [
        (CPU, [], "float32"),
        (TPU, ["float32 products to bfloat16; highest"], "bfloat16"),
        (
            gpu("9.0"),
            ["float32 products to TensorFloat32; highest", "before the bias"],
            "TensorFloat32",
        ),
        (gpu("7.0"), ["before the bias"], "float32"),
    ],
    ids=str,
)
def test_the_default_precision_is_said_in_words(
    device, said, in_json, monkeypatch, capsys
):
    monkeypatch.setattr(jax, "devices", lambda: [device])
    run(monkeypatch, FOUND)
    last = capsys.readouterr().out.split("explains.\n")[1].splitlines()
    assert len(last) == len(said)
    assert all(words in line for words, line in zip(said, last, strict=True))
    run(monkeypatch, FOUND, "--json")
    assert json.loads(capsys.readouterr().out)["default_precision"] == in_json


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
    refused = str(tmp_path / "read-only.png")
    monkeypatch.setattr(command.os, "access", lambda file, _: str(file) != refused)
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
