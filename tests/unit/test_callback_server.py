"""Unknown and failing clients of the callback server: bounded and counted, with few log lines."""

import errno
import os
import socket
from contextlib import ExitStack

import pytest

from tests.callbacks import OK, Receiving, body, request, said
from tests.helpers import named
from tests.polling import until
from vodpoller.callback import connection, server


@pytest.fixture
def receiving(tmp_path, log):
    made = Receiving(tmp_path, log).start()
    yield made
    made.close()


def answer_to(receiving, data, *, in_one_piece=True):
    with receiving.connect() as client:
        for part in [data] if in_one_piece else [bytes([byte]) for byte in data]:
            client.sendall(part)
        return said(client)


# --- what is not a callback -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "status", "refused_for"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "tls"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", 400, "not_http"),
        (b"\x00" * 100 + b"\r\n\r\n", 400, "not_http"),
        (b"POST /vod HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400, "not_http"),
        (b"POST /vod HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400, "not_http"),
        (b"POST /vod HTTP/1.1\r\nHost: x\r\nX: " + b"x" * 20_000, 413, "too_large"),
        (b"POST /vod HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", 413, "too_large"),
        (request(b"{}", path="/other"), 404, "path"),
        (request(b"{}", path="/vod/"), 404, "path"),
        (request(b"", method="GET"), 405, "method"),
        (request(b"no"), 400, "not_json"),
        (request(b"[]"), 400, "no_event"),
    ],
)
def test_what_is_not_a_callback_is_refused_and_counted(receiving, lines, data, status, refused_for):
    for _ in range(3):
        assert answer_to(receiving, data).startswith(f"HTTP/1.1 {status} ".encode())
    until(lambda: receiving.counted("not_an_event") == 3)
    (line,) = named(lines, "callback.refused")
    assert (line["source"], line["refused_for"], line["peer"]) == ("pushed", refused_for, "127.0.0.1")
    assert line["hint"]
    assert not named(lines, "callback.failed")


def test_a_method_that_is_not_allowed_names_the_one_that_is(receiving):
    assert b"\r\nAllow: POST\r\n" in answer_to(receiving, request(b"", method="GET"))


def test_a_body_that_grows_too_large_in_chunks_is_refused(receiving):
    with receiving.connect() as client:
        client.sendall(b"POST /vod HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.settimeout(20)
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        for _ in range(connection.BODY_MAX_BYTES // 65536):
            client.sendall(chunk)
        assert receiving.counted("not_an_event") == 0
        client.sendall(chunk)
        assert said(client).startswith(b"HTTP/1.1 413 ")


def test_incomplete_bodies_share_a_bounded_memory(receiving, monkeypatch):
    monkeypatch.setattr(server, "HELD_MAX_BYTES", 300_000)
    with ExitStack() as clients:
        opened = [clients.enter_context(receiving.connect()) for _ in range(6)]
        for client in opened:
            client.sendall(b"POST /vod HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n" + b" " * 70_000)
        until(lambda: receiving.counted("not_an_event") >= 1)
        assert receiving.push(body()) == OK  # a small body is still read
    until(lambda: receiving.receiver.status()[0].connections == 0)
    assert receiving.push(body(2, Padding="x" * 100_000)) == OK  # the memory is free again


def test_a_port_scan_is_counted_without_a_log_line(receiving, lines):
    for _ in range(5):
        receiving.connect().close()
    until(lambda: receiving.counted("not_an_event") == 5)
    assert not lines


def test_a_client_that_disconnects_within_a_request_is_counted(receiving, lines):
    with receiving.connect() as client:
        client.sendall(request(body())[:-1])
    until(lambda: receiving.counted("not_an_event") == 1)
    assert named(lines, "callback.refused")[0]["refused_for"] == "cut_off"
    assert not receiving.sink.calls


@pytest.mark.parametrize(("data", "status"), [(b"", b""), (b"POST /vod HT", b"HTTP/1.1 408 ")])
def test_a_request_that_takes_too_long_is_ended(tmp_path, log, monkeypatch, data, status):
    monkeypatch.setattr(server, "REQUEST_SECS", 0.2)
    made = Receiving(tmp_path, log).start()
    try:
        with made.connect() as client:
            client.sendall(data)
            assert said(client).startswith(status)
        until(lambda: made.counted("not_an_event") == 1)
    finally:
        made.close()


# --- clients of all kinds ---------------------------------------------------------------------------------------------


def test_a_request_may_come_byte_by_byte(receiving):
    assert answer_to(receiving, request(body()), in_one_piece=False).startswith(b"HTTP/1.1 200 ")


def test_a_request_may_come_in_chunks(receiving):
    data = request(body()).partition(b"\r\n\r\n")[2]
    head = b"POST /vod HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert answer_to(receiving, head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_expects_100_continue_gets_it(receiving):
    data = request(body(), headers="Expect: 100-continue\r\n")
    head, _, rest = data.partition(b"\r\n\r\n")
    with receiving.connect() as client:
        client.sendall(head + b"\r\n\r\n")
        assert client.recv(1000).startswith(b"HTTP/1.1 100 ")
        client.sendall(rest)
        assert said(client).startswith(b"HTTP/1.1 200 ")


def test_http_1_0_is_understood(receiving):
    data = request(body()).replace(b"HTTP/1.1", b"HTTP/1.0", 1)
    assert answer_to(receiving, data).split(b" ", 2)[1] == b"200"


def test_a_second_request_on_a_connection_is_ignored(receiving):
    answer = answer_to(receiving, request(body(1)) + request(body(2)))
    assert answer.count(b"HTTP/1.1 ") == 1
    assert b"\r\nConnection: close\r\n" in answer
    assert len(receiving.sink.accepted) == 1


def test_a_query_after_the_path_is_ignored(receiving):
    assert receiving.push(body(), path="/vod?from=tencent") == OK


def test_a_client_that_is_gone_before_the_answer_counts_as_unanswered(receiving, lines):
    receiving.sink.gate.clear()
    with receiving.connect() as client:
        client.sendall(request(body()))
        until(lambda: receiving.sink.calls)
    until(lambda: receiving.receiver.status()[0].connections == 0)
    receiving.sink.gate.set()
    until(lambda: receiving.counted("unanswered") == 1)
    (line,) = named(lines, "event.settled")
    assert (line["settlement"], line["confirmed"], line["confirm_result"]) == ("confirm", False, "no_answer")
    assert receiving.push(body()) == OK  # the ledger knows that the sink has it
    assert len(receiving.sink.calls) == 1


def test_without_free_descriptors_connections_wait_for_some(tmp_path, log):
    made = Receiving(tmp_path, log)
    left = [OSError(errno.EMFILE, os.strerror(errno.EMFILE))] * 2

    class Scarce(socket.socket):
        def accept(self):
            if left:
                raise left.pop()
            return super().accept()

    made.listening = Scarce(fileno=made.listening.detach())
    made.listening.settimeout(0.0)
    made.start()
    try:
        assert made.push(body()) == OK
        assert not left
    finally:
        made.close()


def test_an_error_at_one_request_affects_no_other(receiving, lines, monkeypatch):
    original = receiving.receiver.arrived
    failing = [RuntimeError("unforeseen")]

    def arrived(found):
        if failing:
            raise failing.pop()
        original(found)

    monkeypatch.setattr(receiving.receiver, "arrived", arrived)
    with monkeypatch.context() as patched:
        patched.setattr(server, "ANSWER_SECS", 0.2)
        assert receiving.push(body(1)) is None
    assert receiving.push(body(2)) == OK
    assert len(named(lines, "callback.failed")) == 1


def test_the_thread_survives_an_error_of_the_operating_system(receiving, lines, monkeypatch):
    failing = [OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))]
    real = server.heapq.heappop

    def heappop(heap):
        if failing:
            raise failing.pop()
        return real(heap)

    monkeypatch.setattr(server.heapq, "heappop", heappop)
    monkeypatch.setattr(server, "LINGER_SECS", 0.1)
    with receiving.connect() as client:
        client.sendall(request(body(1)))
        until(lambda: not failing)
    assert receiving.push(body(2)) == OK
    assert len(named(lines, "callback.failed")) == 1
