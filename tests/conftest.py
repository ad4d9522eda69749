import pytest

from tests.helpers import FakeClock, log_into
from vodpoller.logs import CATALOGUE


@pytest.fixture
def lines():
    return []


@pytest.fixture
def log(lines):
    """A logger whose lines are in `lines`; each must be of the catalogue."""
    yield log_into(lines)
    assert {line["event"] for line in lines} <= set(CATALOGUE)


@pytest.fixture
def clock():
    return FakeClock()
