"""The sockets of callbacks: opened, passed on by systemd, kept over reloads."""

import errno
import os
import re
import socket
import tomllib
from contextlib import closing
from pathlib import Path

import pytest

from vodpoller.callback import sockets as sockets_module
from vodpoller.callback.sockets import CallbackSockets
from vodpoller.checkup.callbacks import check_callbacks
from vodpoller.checkup.finding import Level
from vodpoller.errors import ConfigError, StorageError
from vodpoller.systemd import passed_sockets

ROOT = Path(__file__).parents[2]


@pytest.fixture
def taken():
    """An address at which another socket listens."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield f"127.0.0.1:{sock.getsockname()[1]}"


@pytest.fixture
def free():
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    return f"127.0.0.1:{port}"


@pytest.fixture
def sockets():
    with closing(CallbackSockets(inherited={})) as made:
        yield made


def connects(address):
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


# --- opened and kept --------------------------------------------------------------------------------------------------


def test_an_address_in_use_is_not_a_configuration_error(sockets, taken):
    with pytest.raises(StorageError, match=rf"^{taken} cannot be listened at: .* \(another program listens there\)"):
        sockets.open([taken])


def test_an_address_that_is_not_allowed_is_a_configuration_error(sockets, free, monkeypatch):
    def refuse(address):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(sockets_module, "listen", refuse)
    with pytest.raises(ConfigError, match="ports below 1024"):
        sockets.open([free])


def test_a_new_address_that_cannot_be_opened_is_a_problem(sockets, taken):
    (problem,) = sockets.problems([taken])
    assert problem.startswith(f"sources: {taken} cannot be listened at")


def test_an_open_address_keeps_its_socket(sockets, free):
    first = sockets.open([free])[free]
    assert sockets.open([free])[free] is first
    assert not list(sockets.problems([free]))


def test_another_address_with_one_of_our_ports_is_not_tried(sockets, free):
    sockets.open([free])
    assert not list(sockets.problems([f"0.0.0.0:{free.rsplit(':', 1)[1]}"]))


@pytest.mark.parametrize("hosts", [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")])
def test_a_port_moves_to_another_address_and_back(sockets, free, hosts):
    former, new = (f"{host}:{free.rsplit(':', 1)[1]}" for host in hosts)
    sockets.open([former])
    assert not list(sockets.problems([new]))
    sockets.open([new])
    assert connects(free)
    sockets.open([former])
    assert connects(free)


def test_two_addresses_that_conflict_on_a_port_are_a_problem(sockets, free):
    sockets.open([free])
    (problem,) = sockets.problems([free, f"0.0.0.0:{free.rsplit(':', 1)[1]}"])
    assert "cannot be listened at" in problem


def test_an_address_that_is_not_kept_is_closed(sockets, free):
    sockets.open([free])
    sockets.keep([])
    assert not connects(free)


def test_a_connection_waits_while_nothing_accepts(sockets, free):
    sockets.open([free])
    assert connects(free)


def test_an_inherited_socket_is_used(free):
    host, port = free.split(":")
    inherited = {free: socket.create_server((host, int(port)))}
    fd = inherited[free].fileno()
    with closing(CallbackSockets(inherited=inherited)) as sockets:
        sockets.open([free])
        assert sockets.handed_over() == {free: fd}
        assert not inherited


# --- passed by systemd ------------------------------------------------------------------------------------------------


def test_a_passed_socket_that_no_source_names_is_an_error(free):
    host, port = free.split(":")
    with socket.create_server((host, int(port))) as passed:
        sockets = CallbackSockets(inherited={}, passed=[passed])
        with pytest.raises(
            ConfigError, match=rf"systemd passes a socket that listens at {free}, and no source names it"
        ):
            sockets.open([])
        assert list(sockets.problems([]))


def test_a_passed_socket_that_is_not_tcp_is_an_error(tmp_path):
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="systemd passes a socket"):
            CallbackSockets(inherited={}, passed=[passed]).open([])


def test_a_passed_socket_is_used_and_never_closed(free):
    host, port = free.split(":")
    with socket.create_server((host, int(port))) as passed:
        sockets = CallbackSockets(inherited={}, passed=[passed])
        assert sockets.open([free])[free] is passed
        sockets.close()
        assert connects(free)


def test_a_passed_socket_stays_one_after_the_process_re_executes(free):
    host, port = free.split(":")
    first = CallbackSockets(inherited={}, passed=[socket.create_server((host, int(port)))])
    opened = first.open([free])[free]
    inherited = {address: socket.socket(fileno=os.dup(fd)) for address, fd in first.handed_over().items()}
    second = CallbackSockets(inherited=inherited, passed_before=first.passed)
    with opened, second.open([free])[free]:
        assert first.passed == second.passed == [free]
        with pytest.raises(ConfigError, match="systemd passes a socket"):
            second.open([])


@pytest.mark.parametrize(("bound", "named"), [("::1", "[::1]"), ("::1", "[0:0:0:0:0:0:0:1]")])
def test_an_ipv6_address_is_found_in_any_form(bound, named):
    with socket.create_server((bound, 0), family=socket.AF_INET6) as passed:
        address = f"{named}:{passed.getsockname()[1]}"
        assert CallbackSockets(inherited={}, passed=[passed]).open([address])[address] is passed


@pytest.mark.parametrize(
    "environ",
    [{}, {"LISTEN_PID": "1", "LISTEN_FDS": "1"}, {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "x"}],
)
def test_sockets_passed_to_another_process_are_ignored(environ):
    assert passed_sockets(environ) == []
    assert not environ


# --- check, example ---------------------------------------------------------------------------------------------------


def test_the_check_tells_free_used_and_unusable_addresses_apart(free, taken):
    found = {it.what: it.level for it in check_callbacks([free, taken, "192.0.2.1:8088"])}
    assert found == {
        f"callbacks at {free}": Level.GOOD,
        f"callbacks at {taken}": Level.INFORMATION,
        "callbacks at 192.0.2.1:8088": Level.PROBLEM,
    }


def test_the_socket_unit_listens_where_the_example_does():
    (listens,) = re.findall(r"^ListenStream=(.*)$", (ROOT / "systemd" / "vodpoller.socket").read_text(), re.MULTILINE)
    (listen,) = re.findall(r"^# (listen = .*)$", (ROOT / "config.example.toml").read_text(), re.MULTILINE)
    assert tomllib.loads(listen)["listen"] == listens
