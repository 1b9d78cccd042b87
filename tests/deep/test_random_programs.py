"""Random programs, as many as ``RANDOM_PROGRAMS`` says, by default 2,000."""

import os

import pytest
from random_programs import CASES_PER_PROGRAM, failures, random_case

CASES = int(os.environ.get("RANDOM_PROGRAMS", "2000"))


@pytest.mark.parametrize("first", range(0, CASES, CASES_PER_PROGRAM))
def test_no_random_program_fails_or_gives_another_value(first):
    numbers = range(first, first + CASES_PER_PROGRAM)
    failed = failures([random_case(number) for number in numbers])
    assert not failed, "\n".join(failed)
