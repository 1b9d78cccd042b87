"""Random losses, as many as ``RANDOM_LOSSES`` says, by default 60."""

import os

import pytest
from random_losses import failure, random_case

CASES, CASES_PER_TEST = int(os.environ.get("RANDOM_LOSSES", "60")), 10


@pytest.mark.parametrize("first", range(0, CASES, CASES_PER_TEST))
def test_no_random_loss_fails_or_is_further_off_than_rounding(first):
    numbers = range(first, first + CASES_PER_TEST)
    failed = [f for number in numbers if (f := failure(random_case(number)))]
    assert not failed, "\n".join(failed)
