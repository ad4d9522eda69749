import pytest

from tests.processes import running_system


@pytest.fixture
def system(tmp_path):
    """Simulators and daemons in a folder of their own; all of them are ended with the test."""
    with running_system(tmp_path) as running:
        yield running
