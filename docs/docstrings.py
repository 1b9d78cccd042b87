"""The docstrings of the package for the site: a documented name must have one.

An extension of Griffe, which reads them. ``mkdocs build --strict`` fails of a warning.
"""

import pathlib
import re

import griffe

_logger = griffe.get_logger("docstrings")
_PAGES = pathlib.Path(__file__).with_name("api")
_IN_MARKDOWN = {
    r":\w+:`(jaxlinear(?:\.[a-zA-Z]\w*)+)`": r"[`\1`][\1]",  # A public name.
    r":\w+:`([^`]+)`": r"`\1`",
    r"::$": ":",
    r"^Example:$": "Examples:",
}


class Docstrings(griffe.Extension):
    def on_instance(self, *, obj, **kwargs):
        if obj.docstring:
            for pattern, markdown in _IN_MARKDOWN.items():
                text = obj.docstring.value
                obj.docstring.value = re.sub(pattern, markdown, text, flags=re.M)

    def on_package(self, *, pkg, **kwargs):
        for page in _PAGES.glob("*.md"):
            for name in re.findall(r"^::: jaxlinear\.(\S+)", page.read_text(), re.M):
                _check(pkg[name])


def _check(member):
    if not member.has_docstring:
        _logger.warning(f"{member.path} has no docstring")
    if member.is_class:
        for name, method in member.functions.items():
            if not name.startswith("_"):
                _check(method)
