"""The root certificates that are used."""

import subprocess

import certifi
import pytest

from tests.certificates import make_certificate
from vodpoller.httpclient.trust import Roots, RootsError


@pytest.fixture
def another(tmp_path):
    folder = tmp_path / "another"
    folder.mkdir()
    return make_certificate(folder)


def number_in(roots):
    return roots.context().cert_store_stats()["x509"]


def test_by_default_the_public_roots_are_used(monkeypatch):
    monkeypatch.setattr("requests.utils.DEFAULT_CA_BUNDLE_PATH", certifi.where())  # all of them; see tests/conftest.py
    assert number_in(Roots(env={})) > 50


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"SSL_CERT_FILE": "/nowhere"},
        {"SSL_CERT_DIR": "/nowhere", "REQUESTS_CA_BUNDLE": "/nowhere", "CURL_CA_BUNDLE": "/nowhere"},
    ],
)
def test_configured_roots_replace_all_others(certificate, env):
    assert number_in(Roots(certificate.path, env=env)) == 1


@pytest.mark.parametrize(
    "env",
    [
        {"SSL_CERT_FILE": "{}", "REQUESTS_CA_BUNDLE": "/nowhere"},
        {"SSL_CERT_FILE": "", "REQUESTS_CA_BUNDLE": "{}", "CURL_CA_BUNDLE": "/nowhere"},
        {"CURL_CA_BUNDLE": "{}"},
    ],
)
def test_the_first_variable_that_is_set_counts(certificate, env):
    assert number_in(Roots(env={name: text.format(certificate.path) for name, text in env.items()})) == 1


def test_file_and_folder_of_openssl_count_together(certificate, another):
    folder = another.path.parent
    name = subprocess.run(
        ["openssl", "x509", "-noout", "-subject_hash", "-in", str(another.path)], check=True, capture_output=True
    ).stdout.decode()
    another.path.rename(folder / f"{name.strip()}.0")
    roots = Roots(env={"SSL_CERT_FILE": str(certificate.path), "SSL_CERT_DIR": f"/nowhere:{folder}"})
    assert number_in(roots) == 1  # certificates of a folder are loaded on demand
    assert number_in(Roots(env={"SSL_CERT_DIR": str(folder)})) == 0
    assert number_in(Roots(env={"REQUESTS_CA_BUNDLE": str(folder)})) == 0


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
def test_a_variable_with_a_missing_path_is_named(tmp_path, name):
    with pytest.raises(RootsError, match=rf"\${name} is .*none.*, which does not exist"):
        Roots(env={name: str(tmp_path / "none")}).context()


def test_a_file_is_read_again_by_reread(certificate, another):
    roots = Roots(certificate.path, env={})
    roots.reread()  # nothing has been read yet
    first = roots.context()
    assert roots.context() is first
    certificate.path.write_bytes(certificate.path.read_bytes() + another.path.read_bytes())
    roots.reread()
    assert number_in(roots) == 2
    certificate.path.write_text("no more")
    with pytest.raises(RootsError, match="holds no certificate"):
        roots.reread()
    assert number_in(roots) == 2
