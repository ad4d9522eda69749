import pytest

from vodpoller.httpclient.transport import DeadlineAdapter


@pytest.fixture
def adapter_of():
    """Makes what sends requests, and closes it."""
    adapters = []

    def make(**more):
        adapters.append(DeadlineAdapter(connections=2, **more))
        return adapters[-1]

    yield make
    for adapter in adapters:
        adapter.close()
