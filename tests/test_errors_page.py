"""Every message that the package raises is on the page of errors."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "errors.md").read_text()
NAMED = re.compile(r"`[^`]*`")
OPEN = "…"
"""What differs from case to case."""


def raised():
    """(file and line, message) of each `raise` whose message is written there."""
    for path in sorted((ROOT / "jaxlinear").rglob("*.py")):
        for function in functions(ast.parse(path.read_text())):
            variables = {
                node.targets[0].id: node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and isinstance(node.targets[0], ast.Name)
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    for argument in node.exc.args[:1]:
                        yield place, text(argument, variables)


def functions(module):
    return (n for n in ast.walk(module) if isinstance(n, ast.FunctionDef))


def text(node, variables):
    """A literal, with ``OPEN`` for what is computed."""
    if isinstance(node, ast.FormattedValue):
        return text(node.value, variables)
    if isinstance(node, ast.Name) and node.id in variables:
        return text(variables[node.id], {})
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text(part, variables) for part in node.values)
    return OPEN


def on_the_page():
    """The messages of the page, without what is open at their end."""
    cells = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    spans = re.findall(r"`` (.*?) ``|(?<!`)`([^`]+)`(?!`)", " ".join(cells))
    return [(a or b).rstrip(f"{OPEN} ") for a, b in spans]


MESSAGES = {place: message for place, message in raised() if message[0] != OPEN}


def test_the_messages_are_found():
    assert len(MESSAGES) > 100
    assert len(on_the_page()) > 90


@pytest.mark.parametrize("place", MESSAGES)
def test_message_is_on_the_page(place):
    message = MESSAGES[place].replace(OPEN * 2, OPEN)
    known = [words for words in on_the_page() if " must be" not in words[-8:]]
    assert any(matches(words, message) for words in known), message


def matches(words, message):
    """Whether a message begins with the words, in which ``OPEN`` is anything."""
    if message.startswith(f"`{OPEN}"):  # Of several arguments.
        words, message = (
            NAMED.sub("`name`", text, count=1) for text in (words, message)
        )
    parts = map(re.escape, words.split(OPEN))
    return re.match(".*?".join(parts), message) is not None
