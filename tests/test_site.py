"""What of the site needs no build: its API has all names, its menu every page."""

import pathlib
import re
import runpy
import types

import pytest

import jaxlinear
import jaxlinear.inspect
import jaxlinear.linen
import jaxlinear.nnx
import jaxlinear.torch

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
MODULES = (
    jaxlinear,
    jaxlinear.nnx,
    jaxlinear.linen,
    jaxlinear.torch,
    jaxlinear.inspect,
)


def public_names():
    """Those that a module binds by ``import x as x``, or defines, once each."""
    names = {}
    for module in MODULES:
        source = pathlib.Path(module.__file__).read_text()
        imported = re.findall(r"import \w+ as (\w+)$", source, re.MULTILINE)
        defined = re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE)
        for name in [*imported, *defined]:
            value = getattr(module, name)
            if not name.startswith("_") and not isinstance(value, types.ModuleType):
                names.setdefault(id(value), f"{module.__name__}.{name}")
    return sorted(names.values())


def test_every_public_name_is_on_a_page_of_the_api():
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    found = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert sorted(found) == public_names()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_page_has_a_title_and_a_description_and_is_in_the_menu(page):
    head = re.match(r"---\ntitle: (.+)\ndescription: (.+)\n", page.read_text())
    assert head
    assert not {": ", " #"} & {head[2][i : i + 2] for i in range(len(head[2]))}  # YAML.
    assert len(head[2]) < 160  # What search engines show.
    menu = (ROOT / "mkdocs.yml").read_text()
    assert f": {page.relative_to(ROOT / 'docs')}\n" in menu


def test_the_picture_is_the_one_that_its_script_draws():
    script = ROOT / "docs" / "call.py"
    found = runpy.run_path(str(script))
    assert found["PATH"].read_text() == found["drawn"]()
