"""The table [listener]: invalid values, passwords and permitted hosts."""

import sys
from pathlib import Path

import pytest

from tests.unit.test_config import ENV, VALID
from vodpoller.config import load as config
from vodpoller.errors import ConfigError

PASSWORD = "correct horse"


def load(tmp_path: Path, listener: str):
    (tmp_path / "password").write_text(f"{PASSWORD}\nwritten by: the operator\n")
    (tmp_path / "short").write_text("1234567\nthis is a comment\n")
    path = tmp_path / "config.toml"
    path.write_text(f"{VALID}\n[listener]\n{listener}\n")
    return config.load(path, env=ENV)


def problem_of(tmp_path, listener):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, listener)
    (problem,) = caught.value.problems
    return problem.removeprefix(f"{tmp_path / 'config.toml'}: listener.")


@pytest.mark.parametrize(
    "address", ["", "localhost", ":9464", "127.0.0.1:", "127.0.0.1:0", "::1:9464", "a@b:1", "h:1/x"]
)
def test_what_is_not_an_address_is_refused(tmp_path, address):
    assert problem_of(tmp_path, f'address = "{address}"').startswith("address: is not an address with a port")


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464", "10.0.0.7:9464", "[2001:db8::7]:9464", "a.example:1"])
def test_an_address_beyond_loopback_needs_password_or_permission(tmp_path, address):
    assert "password_file" in problem_of(tmp_path, f'address = "{address}"')
    hosts = 'hosts = ["a.example"]'
    assert not load(tmp_path, f'address = "{address}"\npassword_file = "password"\n{hosts}').warnings
    assert not load(tmp_path, f'address = "{address}"\nunauthenticated = true\n{hosts}').warnings


@pytest.mark.parametrize("address", ["127.0.0.1:9464", "[::1]:9464", "localhost:9464"])
def test_a_loopback_address_needs_no_password(tmp_path, address):
    assert load(tmp_path, f'address = "{address}"').listener.address == address


def test_without_an_address_there_is_no_listener(tmp_path):
    assert load(tmp_path, "").listener.address is None


@pytest.mark.parametrize(
    ("name", "words"),
    [("short", "a first line of less than 8 characters"), ("missing", "cannot be read"), ("", "is empty")],
)
def test_a_password_that_cannot_be_used_is_refused(tmp_path, name, words):
    problem = problem_of(tmp_path, f'address = "127.0.0.1:9464"\npassword_file = "{name}"')
    assert problem.startswith("password_file: ")
    assert words in problem
    assert "1234567" not in problem


def test_the_password_is_the_first_line_and_is_hidden(tmp_path):
    loaded = load(tmp_path, 'address = "127.0.0.1:9464"\npassword_file = "password"')
    assert loaded.listener.password_file.get() == PASSWORD
    assert PASSWORD in [secret.get() for secret in loaded.secrets()]
    assert PASSWORD not in repr(loaded.listener)


def test_a_password_that_became_too_short_is_not_used(tmp_path):
    secret = load(tmp_path, 'address = "127.0.0.1:9464"\npassword_file = "password"').listener.password_file
    (tmp_path / "password").write_text("short\n")
    with pytest.raises(OSError, match="less than 8"):
        secret.reread()
    assert secret.get() == PASSWORD


@pytest.mark.parametrize("host", ["vod.example:9464", "http://vod.example", "::1", "", "a b"])
def test_a_host_with_a_port_or_a_scheme_is_refused(tmp_path, host):
    assert "is not a host without a port" in problem_of(tmp_path, f'address = "127.0.0.1:1"\nhosts = ["{host}"]')


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "[::]:9464"])
def test_a_wildcard_without_hosts_is_warned_of(tmp_path, address):
    (warning,) = load(tmp_path, f'address = "{address}"\nunauthenticated = true').warnings
    assert warning.startswith("listener.hosts: is missing")


@pytest.mark.parametrize(
    ("settings", "hosts"),
    [
        ('address = "127.0.0.1:1"', {"127.0.0.1", "localhost", "[::1]"}),
        ('address = "VOD.example:1"\nunauthenticated = true', {"vod.example", "127.0.0.1", "localhost", "[::1]"}),
        ('address = "[::1]:1"\nhosts = ["VOD.example"]', {"vod.example"}),
    ],
)
def test_the_known_hosts_are_those_configured_or_its_own(tmp_path, settings, hosts):
    assert load(tmp_path, settings).listener.known_hosts() == hosts


@pytest.mark.parametrize("module", ["waitress", "prometheus_client", "jinja2"])
def test_a_missing_package_is_named_with_the_command_to_install_it(tmp_path, monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    problem = problem_of(tmp_path, 'address = "127.0.0.1:9464"')
    assert problem == (
        f"address: needs packages that are not installed: \"{module}\" (pip install 'vodpoller[listener]')"
    )
    assert load(tmp_path, "").listener.address is None
