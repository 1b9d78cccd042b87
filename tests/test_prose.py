"""Prose is plain English: none of our texts has the habits that are listed here."""

import io
import pathlib
import re
import tokenize

import pytest

ROOT = pathlib.Path(__file__).parents[1]
TEXTS = [
    "*.md",
    "docs/*.md",
    "docs/api/*.md",
    "examples/*.py",
    "jaxlinear/**/*.py",
    "benchmarks/**/*.py",
    "tests/**/*.py",
]
HABITS = {
    r"(?<![Ll]eft)(?<!leave) alone\b": "only",
    r", too[.,;:)]": "also",
    r"\badd(s|ed|ing)?( \w+)? up\b": "sum",
    r"\bfor itself\b": "its own",
    r"\binside of\b": "inside",
    r"\blea(ves?|ving) in\b": "is returned as",
    r"(?<![Tt]here) (is|are) no (?!longer|more|less)": "is not a",
    r"\bst(ands?|ood) (in|there|at|beside|behind|before|next|around)\b": "is",
    r"\b(that|those) of [^.;:]{,40}\b(that|those) of\b": "name the noun",
}


def prose(path):
    """The text of a page without its code, or the comments and docstrings of a file."""
    text = path.read_text()
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    else:
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        text = "\n".join(
            token.string.lstrip("#")
            for token in tokens
            if token.type == tokenize.COMMENT or token.string.startswith('"""')
        )
    return " ".join(text.split())


def habits_in(text):
    return {
        f"...{text[max(0, found.start() - 40) : found.end() + 20]}...": better
        for habit, better in HABITS.items()
        for found in re.finditer(habit, text)
    }


PATHS = sorted(path for pattern in TEXTS for path in ROOT.glob(pattern))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_prose_has_none_of_our_bad_habits(path):
    assert not habits_in(prose(path))


def test_each_habit_is_found():
    text = (
        "It needs JAX alone, too. It adds them up for itself inside of what leaves in"
        " float32 and is no array. It stands beside that of X and those of Y."
    )
    assert {*habits_in(text).values()} == {*HABITS.values()}
