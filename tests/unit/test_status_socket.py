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


def test_only_its_own_user_may_ask(listen, path):
    listen()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@contextmanager
def in_folder_of(path):
    """The folder as working directory: names in it are short enough for any socket call."""
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        yield path.name
    finally:
        os.chdir(before)


@pytest.fixture
def dead(path):
    """What a process that was killed leaves there."""
    with closing(socket.socket(socket.AF_UNIX)) as listening, in_folder_of(path) as name:
        listening.bind(name)


def test_where_nothing_is_no_daemon_answers(path):
    assert ask(path, {}, timeout_secs=5) is None


def test_where_a_daemon_died_no_daemon_answers(path, dead):
    assert ask(path, {}, timeout_secs=5) is None


def test_what_a_dead_process_left_is_replaced(listen, path, dead):
    listen()
    assert ask(path, {}, timeout_secs=5) == {"asked": {}}


def test_a_closed_socket_leaves_no_name(listen, path):
    listen().close()
    assert not path.exists()
    assert ask(path, {}, timeout_secs=5) is None


@pytest.mark.parametrize("sent", [b"", b"\n", b"[1]\n", b"\xff\xff\n", b"x" * 10_000 + b"\n"])
def test_a_request_that_cannot_be_read_ends_nothing(listen, path, sent):
    listen()
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with in_folder_of(path) as name:
            client.connect(name)
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        client.settimeout(5)
        try:
            assert b"not a JSON object" in client.recv(1000)
        except ConnectionResetError:  # it had enough before all of the request was read
            assert len(sent) > 4096
    assert ask(path, {}, timeout_secs=5) == {"asked": {}}


@pytest.mark.parametrize("sent", [b"", b"{"])
def test_a_client_that_says_nothing_more_holds_others_up_for_a_moment_only(listen, path, sent, monkeypatch):
    monkeypatch.setattr(status_socket, "CLIENT_SECS", 0.3)
    listen()
    over = threading.Event()
    with closing(socket.socket(socket.AF_UNIX)) as client:
        with in_folder_of(path) as name:
            client.connect(name)

        def drip():  # each byte comes well within the time for one
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


def test_closing_does_not_wait_for_an_answer_that_hangs(listen, path, monkeypatch):
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


def test_a_bug_in_the_answer_is_logged_and_ends_nothing(listen, path, lines):
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


def test_where_it_cannot_be_made_that_is_an_error(tmp_path, log):
    with pytest.raises(OSError, match=r"No such file|not a directory"):
        StatusSocket(tmp_path / "missing" / "journal.db.sock", dict, log=lambda: log)


# --- what is answered later -------------------------------------------------------------------------------------------


def test_a_request_that_takes_long_holds_up_no_other(listen, path):
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


def test_a_client_that_has_gone_away_fails_no_later_answer(listen, path):
    askers = SimpleQueue()
    listen(later={"slow": askers.put})
    with pytest.raises(TimeoutError):
        ask(path, {"command": "slow"}, timeout_secs=0.2)
    askers.get(timeout=10).answer({"done": "x" * 1_000_000})
    assert ask(path, {}, timeout_secs=10) == {"asked": {}}


# --- without its path -------------------------------------------------------------------------------------------------


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
def test_of_a_process_that_cannot_be_seen_no_socket_is_found(pid):
    assert socket_of_process(pid) is None
