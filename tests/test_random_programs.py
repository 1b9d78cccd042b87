"""Random programs: the first of them. `deep/test_random_programs.py` runs thousands."""

import pytest
from random_programs import CASES_PER_PROGRAM, failures, random_case


@pytest.mark.parametrize("first", range(0, 150, CASES_PER_PROGRAM))
def test_no_random_program_fails_or_gives_another_value(first):
    numbers = range(first, first + CASES_PER_PROGRAM)
    failed = failures([random_case(number) for number in numbers])
    assert not failed, "\n".join(failed)
