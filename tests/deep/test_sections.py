"""Every Python block of every page of the documentation runs."""

import re

import jax
import pytest
from test_documentation import PAGES, run, sections

SECTIONS = {name: found for page in PAGES for name, found in sections(page).items()}


@pytest.fixture(autouse=True)
def _ordinary_settings():
    """A reader's settings, not those of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Qwix's.
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_section_of_the_documentation_runs(section):
    """Its blocks in order. What is not installed here ends it."""
    names = {}
    for title, code in section:
        for module in re.findall(r"^(?:import|from) (\w+)", code, re.MULTILINE):
            pytest.importorskip(module)
        run(title, code, names)
