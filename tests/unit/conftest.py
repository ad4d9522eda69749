import pytest

from vodpoller.httpclient.transport import DeadlineAdapter


@pytest.fixture
def adapter_of():
    """A function that makes a `DeadlineAdapter`; each is closed after the test."""
    adapters = []

    def make(**more):
        adapters.append(DeadlineAdapter(connections=2, **more))
        return adapters[-1]

    yield make
    for adapter in adapters:
        adapter.close()
