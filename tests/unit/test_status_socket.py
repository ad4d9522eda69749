import os
import socket
import stat
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue

import pytest

from tests.helpers import named
from vodpoller import status_socket
from vodpoller.status_socket import StatusSocket, ask, socket_of_process, socket_path


@pytest.fixture(params=["short", "d" * 100 + "/" + "n" * 60])
def path(request, tmp_path):
    found = socket_path(tmp_path / request.param / "journal.db")
    found.parent.mkdir(parents=True)
    return found


@pytest.fixture
def listen(path, log):
    opened = []

    def start(answer=lambda request: {"asked": request}, **more):
        opened.append(StatusSocket(path, answer, log=lambda: log, **more))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def test_a_request_is_answered(listen, path):
    listen()
    assert ask(path, {"strict": True}, timeout_secs=5) == {"asked": {"strict": True}}
    assert ask(path, {"again": 1}, timeout_secs=5) == {"asked": {"again": 1}}


def test_only_the_user_of_the_daemon_may_connect(listen, path):
    listen()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@contextmanager
def in_folder_of(path):
    """Change to the folder of the path, where the file's name is short enough for any socket call."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        yield path.name
    finally:
        os.chdir(before)


@pytest.fixture
def dead(path):
    """The socket file that a killed process leaves."""
    with closing(socket.socket(socket.AF_UNIX)) as listening, in_folder_of(path) as name:
        listening.bind(name)


def test_without_a_socket_file_no_daemon_answers(path):
    assert ask(path, {}, timeout_secs=5) is None


def test_at_the_socket_file_of_a_dead_daemon_no_daemon_answers(path, dead):
    assert ask(path, {}, timeout_secs=5) is None


def test_the_socket_file_of_a_dead_process_is_replaced(listen, path, dead):
    listen()
    assert ask(path, {}, timeout_secs=5) == {"asked": {}}


def test_a_closed_socket_leaves_no_file(listen, path):
    listen().close()
    assert not path.exists()
    assert ask(path, {}, timeout_secs=5) is None


@pytest.mark.parametrize("sent", [b"", b"\n", b"[1]\n", b"\xff\xff\n", b"x" * 10_000 + b"\n"])
def test_an_unreadable_request_does_not_stop_the_socket(listen, path, sent):
    listen()
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with in_folder_of(path) as name:
            client.connect(name)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
        try:
            assert b"not a JSON object" in client.recv(1000)
        except ConnectionResetError:  # it closed the connection before it had read the whole request
            assert len(sent) > 4096
    assert ask(path, {}, timeout_secs=5) == {"asked": {}}


@pytest.mark.system
@pytest.mark.parametrize("sent", [b"", b"{"])
def test_a_silent_client_delays_others_only_briefly(listen, path, sent, monkeypatch):
    monkeypatch.setattr(status_socket, "CLIENT_SECS", 0.3)
    listen()
    over = threading.Event()
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with in_folder_of(path) as name:
            client.connect(name)

        def drip():  # each byte comes well within the time limit
            with suppress(OSError):
                while sent and not over.wait(0.1):
                    client.sendall(sent)

        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert ask(path, {}, timeout_secs=10) == {"asked": {}}
        finally:
            over.set()
            dripping.join()


def test_closing_does_not_wait_for_a_hanging_answer(listen, path, monkeypatch):
    monkeypatch.setattr(status_socket, "CLIENT_SECS", 0.2)
    asked, over = threading.Event(), threading.Event()

    def answer(request):
        asked.set()
        over.wait(30)
        return {}

    listening = listen(answer)
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with in_folder_of(path) as name:
            client.connect(name)
        client.sendall(b"{}\n")
        assert asked.wait(10)
        listening.close()
        assert not over.is_set()
        over.set()


def test_a_bug_in_an_answer_is_logged_and_stops_nothing(listen, path, lines):
    answers = [RuntimeError("a bug")]

    def answer(request):
        if answers:
            raise answers.pop()
        return {}

    listen(answer)
    with pytest.raises(ConnectionError):
        ask(path, {}, timeout_secs=5)
    assert ask(path, {}, timeout_secs=5) == {}
    assert named(lines, "task.failed")


def test_a_socket_file_that_cannot_be_made_is_an_error(tmp_path, log):
    with pytest.raises(OSError, match=r"No such file|not a directory"):
        StatusSocket(tmp_path / "missing" / "journal.db.sock", dict, log=lambda: log)


# --- later answers ----------------------------------------------------------------------------------------------------


def test_a_slow_request_does_not_delay_others(listen, path):
    askers, answers = SimpleQueue(), []
    listen(later={"slow": askers.put})
    asking = threading.Thread(target=lambda: answers.append(ask(path, {"command": "slow"}, timeout_secs=30)))
    asking.start()
    asker = askers.get(timeout=10)
    assert ask(path, {"command": "quick"}, timeout_secs=10) == {"asked": {"command": "quick"}}
    assert answers == []
    asker.answer({"done": 1})
    asking.join()
    assert answers == [{"done": 1}]


def test_a_client_that_disconnected_does_not_break_later_answers(listen, path):
    askers = SimpleQueue()
    listen(later={"slow": askers.put})
    with pytest.raises(TimeoutError):
        ask(path, {"command": "slow"}, timeout_secs=0.2)
    askers.get(timeout=10).answer({"done": "x" * 1_000_000})
    assert ask(path, {}, timeout_secs=10) == {"asked": {}}


# --- sockets whose path is not given ----------------------------------------------------------------------------------


def test_a_socket_that_listens_already_is_taken_over(listen, path):
    passed_on = socket.socket(socket.AF_UNIX)
    with in_folder_of(path) as name:
        passed_on.bind(name)
    passed_on.listen()
    listen(listening=passed_on)
    assert ask(path, {"again": 1}, timeout_secs=5) == {"asked": {"again": 1}}


def test_the_socket_of_a_process_is_found(tmp_path, log):
    path = socket_path(tmp_path / "journal.db")
    assert socket_of_process(os.getpid()) != path
    listening = StatusSocket(path, dict, log=lambda: log)
    try:
        assert socket_of_process(os.getpid()) == path
    finally:
        listening.close()


@pytest.mark.parametrize("pid", [2**22 + 1])
def test_a_process_that_cannot_be_seen_has_no_socket(pid):
    assert socket_of_process(pid) is None
