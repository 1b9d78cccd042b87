"""The site as it is built: strictly, and without a request to another host."""

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOADED = r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^\s\">]+"
LINKED = r"<link[^>]*\srel=\"?(?:stylesheet|preload|icon|preconnect)[^>]*(?:https?:)?//"


def build(folder, site):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path):
    """What the site is made of, to be broken."""
    if not importlib.util.find_spec("mkdocstrings"):
        pytest.skip("mkdocs is not installed")
    for name in "docs", "jaxlinear":
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in "mkdocs.yml", "CHANGELOG.md":
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_the_site_is_built_and_loads_nothing_from_elsewhere(copy):
    result = build(copy, copy / "site")
    assert result.returncode == 0, result.stderr
    pages = [path.read_text() for path in (copy / "site").rglob("*.html")]
    assert len(pages) > 12
    for page in pages:
        assert not re.findall(LOADED, page)
        assert not re.findall(LINKED, page)
    styles = "".join(p.read_text() for p in (copy / "site").rglob("*.css"))
    assert not re.findall(r"url\(\"?(?:https?:)?//", styles)


def test_signatures_are_over_several_lines(copy):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    # mkdocstrings breaks them only where a formatter is installed.
    docs = project["optional-dependencies"]["docs"]
    assert any(requirement.startswith("ruff") for requirement in docs)
    build(copy, copy / "site")
    page = (copy / "site" / "api" / "function" / "index.html").read_text()
    signature = re.search(r'<div class="doc-signature.*?</div>', page, re.S)[0]
    lines = re.sub("<[^>]*>", "", signature).strip().splitlines()
    assert lines[0].endswith("linear(")
    assert lines[1].strip().startswith("x: ArrayLike")
    assert len(lines) > 8


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_broken_link_fails_the_build(copy):
    replace(copy / "docs/index.md", "(speed.md)", "(velocity.md)")
    result = build(copy, copy / "site")
    assert result.returncode == 1
    assert "velocity.md" in result.stderr


def test_a_link_to_no_heading_fails_the_build(copy):
    replace(copy / "docs/index.md", "products.md#accuracy", "products.md#errors")
    result = build(copy, copy / "site")
    assert result.returncode == 1
    assert "errors" in result.stderr


def test_a_missing_docstring_fails_the_build(copy):
    source = copy / "jaxlinear" / "nnx" / "_convert.py"
    text = source.read_text()
    source.write_text(
        re.sub(r'(def revert\(.*?:\n) +""".*?"""', r"\1", text, flags=re.S)
    )
    result = build(copy, copy / "site")
    assert result.returncode == 1
    assert "jaxlinear.nnx.revert has no docstring" in result.stderr
