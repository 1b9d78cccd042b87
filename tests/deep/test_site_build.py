"""The site as it is built: strictly, and without a request to another host."""

import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LOADED = r"<(?:script|img|iframe|source)[^>]*\ssrc=\"?(?:https?:)?//[^\s\">]+"
LINKED = r"<link[^>]*\srel=\"?(?:stylesheet|preload|icon|preconnect)[^>]*(?:https?:)?//"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocstrings", reason="MkDocs is not installed")
    site = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", site]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return site


def test_the_site_loads_nothing_from_elsewhere(site):
    pages = [path.read_text() for path in site.rglob("*.html")]
    assert len(pages) > 12
    for page in pages:
        assert not re.findall(LOADED, page)
        assert not re.findall(LINKED, page)
    styles = "".join(path.read_text() for path in site.rglob("*.css"))
    assert not re.findall(r"url\(\"?(?:https?:)?//", styles)


def test_signatures_are_over_several_lines(site):
    """A formatter must be installed: without one mkdocstrings does not break them."""
    page = (site / "api" / "function" / "index.html").read_text()
    signature = re.search(r'<div class="doc-signature.*?</div>', page, re.S)[0]
    lines = re.sub("<[^>]*>", "", signature).strip().splitlines()
    assert lines[0].endswith("linear(")
    assert lines[1].strip().startswith("x: ArrayLike")
    assert len(lines) > 8


def test_the_picture_of_a_call_is_on_its_page(site):
    page = (site / "call" / "index.html").read_text()
    assert (ROOT / "docs" / "call.svg").read_text().strip() in page
