import pytest

from tests.processes import running_system


@pytest.fixture
def system(tmp_path):
    """Simulators and daemons in their own folder; all of them end with the test."""
    with running_system(tmp_path) as running:
        yield running
