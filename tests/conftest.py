import pytest

from tests.certificates import make_certificate
from tests.helpers import FakeClock, log_into
from vodpoller.logs import CATALOGUE


@pytest.fixture(autouse=True)
def no_roots_of_the_machine(monkeypatch):
    for name in ("SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)


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


@pytest.fixture
def certificate(tmp_path_factory):
    return make_certificate(tmp_path_factory.mktemp("certificate"))
