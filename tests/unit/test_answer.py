"""A plain head is read as http.client reads it; after any other head, the connection is not used again."""

import http.client
import io
import socket
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from urllib3 import HTTPHeaderDict

from vodpoller.httpclient.answer import HttpAnswer, Incoming
from vodpoller.httpclient.words import UnforeseenAnswerError

EXTRA = b"HTTP/1.1 500 Extra\r\n\r\n"


class UnlimitedDeadline:
    def left_secs(self):
        return 5.0


class Pieces:
    """Replaces a socket: returns the given pieces, then the end of the stream."""

    def __init__(self, *pieces):
        self.pieces = [piece for piece in reversed(pieces) if piece]
        self.received = 0

    def settimeout(self, _secs):
        pass

    def recv(self, number):
        if not self.pieces:
            return b""
        piece = self.pieces.pop()
        if len(piece) > number:
            self.pieces.append(piece[number:])
            piece = piece[:number]
        self.received += len(piece)
        return piece

    def recv_into(self, buffer):
        piece = self.recv(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


class Lines(io.BytesIO):
    """Records whether the data ended within the lines; http.client would take that for the end of the head."""

    was_cut = False

    def makefile(self, _mode):
        return self

    def readline(self, limit):
        line = super().readline(limit)
        self.was_cut = self.was_cut or not line
        return line


def answer_of(*pieces):
    return HttpAnswer(Incoming(Pieces(*pieces), UnlimitedDeadline()), "POST")


def read(answer, was_cut=lambda: False):
    """Everything that a caller sees of an answer, or the type of the error."""
    try:
        answer.begin()
        if was_cut():
            return http.client.IncompleteRead
        body = answer.read()
    except (http.client.HTTPException, ValueError) as error:
        return type(error)
    headers = [(name, unfolded(value)) for name, value in answer.headers.items()]
    return answer.status, answer.reason, answer.version, HTTPHeaderDict(headers), body


def unfolded(value):
    return value if {"\r", "\n"}.isdisjoint(value) else " ".join(map(str.strip, value.splitlines()))


def by_http_client(data):
    lines = Lines(data)
    return read(http.client.HTTPResponse(lines, method="POST"), lambda: lines.was_cut)


def is_used_again(*pieces):
    answer = answer_of(*pieces)
    answer.begin()
    return not answer.will_close


def head(*fields, line=b"HTTP/1.1 200 OK"):
    return b"\r\n".join([line, *fields, b"", b""])


PLAIN = {
    "a length": head(b"Content-Length: 2") + b"ok",
    "a length of zero": head(b"Content-Length: 0"),
    "a length with leading zeros": head(b"Content-Length: 0002") + b"ok",
    "chunks": head(b"Transfer-Encoding: Chunked") + b"2\r\nok\r\n0\r\n\r\n",
    "without a body": head(line=b"HTTP/1.1 204 No Content"),
    "not modified": head(b"Content-Length: 5", line=b"HTTP/1.1 304 Not Modified"),
    "no reason": head(b"Content-Length: 0", line=b"HTTP/1.1 503"),
    "an empty reason": head(b"Content-Length: 0", line=b"HTTP/1.1 503 "),
    "a long reason": head(b"Content-Length: 0", line=b"HTTP/1.1 503  Please come\tback "),
    "blanks around a value": head(b"A: \t x y \t", b"B:z", b"C:", b"D: ", b"Content-Length: 1") + b"o",
    "one name twice": head(b"Set-Cookie: a=b", b"set-cookie: c=d", b"Content-Length: 0"),
    "colons in values": head(b"A: b: c", b"Location: http://a.example:80/", b"Content-Length: 0"),
    "strange names": head(b"!#$%&'*+.^_`|~-: x", b"From: y", b"Content-Length: 0"),
    "a type that e-mail parsers split": head(b"Content-Type: multipart/mixed", b"Content-Length: 2") + b"ok",
    "99 fields": head(*[b"X: y"] * 98, b"Content-Length: 2") + b"ok",
    "HTTP/1.0 with keep-alive": head(b"Connection: keep-alive", b"Content-Length: 2", line=b"HTTP/1.0 200 OK") + b"ok",
}
# Plain heads after which the connection ends, whether a header says so or not.
LAST = {
    "a body up to the end of the connection": head(b"X: y") + b"all of this",
    "close": head(b"Connection: close", b"Content-Length: 2") + b"ok",
    "close among others": head(b"Connection: keep-alive, Close", b"Content-Length: 2") + b"ok",
    "close after another": head(b"Connection: keep-alive", b"Connection: close", b"Content-Length: 2") + b"ok",
    "HTTP/1.0": head(b"Content-Length: 2", line=b"HTTP/1.0 200 OK") + b"ok",
}
ODD = {
    "two lengths": head(b"Content-Length: 2", b"Content-Length: 2") + b"ok",
    "two lengths in one": head(b"Content-Length: 2, 2") + b"ok",
    "two lengths that differ": head(b"Content-Length: 2", b"Content-Length: 3") + b"ok",
    "a length with a sign": head(b"Content-Length: +2") + b"ok",
    "a length below zero": head(b"Content-Length: -2") + b"ok",
    "a length with a blank after it": head(b"Content-Length: 2 ") + b"ok",
    "a length with a blank inside": head(b"Content-Length: 2 3") + b"ok",
    "a length with an underscore": head(b"Content-Length: 1_0") + b"ok",
    "an empty length": head(b"Content-Length:") + b"ok",
    "a length of many digits": head(b"Content-Length: " + b"9" * 5000) + b"ok",
    "length and chunks": head(b"Content-Length: 2", b"Transfer-Encoding: chunked") + b"2\r\nok\r\n0\r\n\r\n",
    "chunks twice": head(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked") + b"0\r\n\r\n",
    "chunks after another coding": head(b"Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n",
    "another coding": head(b"Transfer-Encoding: identity", b"Content-Length: 2") + b"ok",
    "chunks without a body": head(b"Transfer-Encoding: chunked", line=b"HTTP/1.1 204 X"),
    "chunks in HTTP/1.0": head(b"Transfer-Encoding: chunked", b"Connection: keep-alive", line=b"HTTP/1.0 200 OK")
    + b"2\r\nok\r\n0\r\n\r\n",
    "a length without a body": head(b"Content-Length: 2", line=b"HTTP/1.1 204 X"),
    "a bare CR in a value": head(b"X: a\rb", b"Content-Length: 2") + b"ok",
    "a header after a bare CR": head(b"X: a\rContent-Length: 1", b"Content-Length: 2") + b"ok",
    "a bare LF in a value": head(b"X: a\n b", b"Content-Length: 2") + b"ok",
    "a NUL": head(b"X: a\0b", b"Content-Length: 2") + b"ok",
    "a NUL in a name": head(b"X\0: a", b"Content-Length: 2") + b"ok",
    "bytes beyond ASCII": head("X: ü".encode(), b"Content-Length: 2") + b"ok",
    "a folded value": head(b"X: a", b"\t b", b"Content-Length: 2") + b"ok",
    "a folded length": head(b"Content-Length:", b" 2") + b"ok",
    "a first line that is folded": head(b" X: a", b"Content-Length: 2") + b"ok",
    "no colon": head(b"Content-Length: 2", b"no header at all") + b"ok",
    "no name": head(b": x", b"Content-Length: 2") + b"ok",
    "a blank before the colon": head(b"Content-Length : 2") + b"ok",
    "a blank in a name": head(b"X Y: z", b"Content-Length: 2") + b"ok",
    "LF for all line ends": head(b"Content-Length: 2").replace(b"\r\n", b"\n") + b"ok",
    "LF for one line end": b"HTTP/1.1 200 OK\r\nX: y\nContent-Length: 2\r\n\r\nok",
    "LF for the last line end": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\nok",
    "CR twice": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\r\n\r\nok",
    "HTTP/1.2": head(b"Content-Length: 2", line=b"HTTP/1.2 200 OK") + b"ok",
    "two blanks": head(b"Content-Length: 2", line=b"HTTP/1.1  200 OK") + b"ok",
    "a status beyond 599": head(b"Content-Length: 2", line=b"HTTP/1.1 600 OK") + b"ok",
    "an empty line first": b"\r\n" + head(b"Content-Length: 2") + b"ok",
    "100 fields": head(*[b"X: y"] * 99, b"Content-Length: 2") + b"ok",
    "not HTTP": b"SSH-2.0-OpenSSH\r\n",
    "not a status": head(line=b"HTTP/1.1 OK 200"),
    "over 64 KiB": head(b"X: " + b"x" * 60_000, b"Y: " + b"y" * 60_000, b"Content-Length: 2") + b"ok",
}


@pytest.mark.parametrize("data", ODD.values(), ids=ODD)
def test_http_client_reads_an_odd_head_and_the_connection_ends(data):
    assert read(answer_of(data)) == by_http_client(data)
    if isinstance(by_http_client(data), tuple):
        assert not is_used_again(data + EXTRA)


@pytest.mark.system
@pytest.mark.parametrize("data", [*PLAIN.values(), *LAST.values(), *ODD.values()], ids=[*PLAIN, *LAST, *ODD])
def test_it_does_not_matter_how_an_answer_is_split(data):
    wanted = by_http_client(data)
    for cut in range(1, min(len(data), 400)):
        assert read(answer_of(data[:cut], data[cut:])) == wanted, cut
    assert read(answer_of(*[data[at : at + 1] for at in range(len(data))])) == wanted


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_after_a_plain_head_the_connection_is_used_again(data):
    assert read(answer_of(data)) == by_http_client(data)
    assert is_used_again(data + EXTRA)
    assert all(is_used_again(data[:cut], data[cut:]) for cut in range(1, min(len(data), 400)))


@pytest.mark.parametrize("data", LAST.values(), ids=LAST)
def test_the_connection_may_end_after_a_plain_head(data):
    assert read(answer_of(data)) == by_http_client(data)
    assert not is_used_again(data)


@pytest.mark.parametrize("data", [PLAIN["a length"], PLAIN["chunks"], PLAIN["without a body"]])
def test_data_after_an_answer_is_left_over(data):
    for extra, left_over in ((b"", False), (b"\r", True), (EXTRA, True)):
        answer = answer_of(data + extra)
        assert isinstance(read(answer), tuple)
        assert answer.incoming.left_over is left_over


def test_a_first_line_that_is_not_http_is_an_error_at_once():
    """Waiting for a server that then sends nothing would take the whole time limit."""
    for line in (b"SSH-2.0-OpenSSH\r\n", b"HTTP/1.1 OK\r\n", b"220 mail.example ESMTP\n"):
        pieces = Pieces(line, b"never")
        with pytest.raises(http.client.BadStatusLine):
            HttpAnswer(Incoming(pieces, UnlimitedDeadline()), "POST").begin()
        assert pieces.received == len(line)


def test_a_plain_head_has_at_most_64_kib():
    pieces = Pieces(*[b"HTTP/1.1 200 OK\r\nX: ", *[b"x" * 1000] * 1000])
    with pytest.raises(http.client.LineTooLong):
        HttpAnswer(Incoming(pieces, UnlimitedDeadline()), "POST").begin()
    assert pieces.received < 150_000


@pytest.mark.parametrize("data", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n", b"HTTP/1.1 200 OK\nX: y\n"])
def test_a_head_that_is_cut_is_not_an_answer(data):
    with pytest.raises(http.client.HTTPException):
        answer_of(data).begin()


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\n\n", b"HTTP/1.1 103 Early\r\nno header\r\n\r\n"])
def test_an_odd_interim_answer_is_not_taken_for_the_answer(interim):
    with pytest.raises(UnforeseenAnswerError, match="cannot be read"):
        answer_of(interim + PLAIN["a length"]).begin()


def test_a_head_after_interim_answers_is_read_as_without_them():
    interim = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n"
    for data in [*PLAIN.values(), *LAST.values()]:
        whole = interim + data
        wanted = by_http_client(data)
        assert [read(answer_of(whole[:cut], whole[cut:])) for cut in range(1, 120)] == [wanted] * 119
    for data in ODD.values():
        assert read(answer_of(interim + data)) == by_http_client(data)


# --- heads of any kind ---

NAMES = st.sampled_from([b"Content-Length", b"Transfer-Encoding", b"Connection", b"X-A", b"x-a", b"X B", b"", b"X\0"])
VALUES = st.one_of(
    st.sampled_from([b"2", b"0", b"+2", b"chunked", b"close", b"keep-alive", b"2, 2", b"\r", b"\n", b"\r\n ", b"\xff"]),
    st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=8).map(lambda text: text.encode("latin-1")),
)
SEPARATORS = st.sampled_from([b": ", b":", b" : ", b":\t", b""])
ENDS = st.sampled_from([b"\r\n"] * 9 + [b"\n", b"\r", b"\r\n "])
FIELDS = st.lists(st.tuples(NAMES, SEPARATORS, VALUES, ENDS).map(b"".join), max_size=5).map(b"".join)
FIRST_LINES = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n"] * 5
    + [b"HTTP/1.0 200 OK\r\n", b"HTTP/1.1 204 \r\n", b"HTTP/1.1 304 X\r\n", b"HTTP/1.1 200\n", b"HTTP/2 200 OK\r\n"]
)
BODIES = st.sampled_from([b"ok", b"2\r\nok\r\n0\r\n\r\n", b"", b"HTTP/1.1 500 Extra\r\n\r\n"])


@given(st.tuples(FIRST_LINES, FIELDS, ENDS, BODIES).map(b"".join), st.data())
def test_any_head_is_read_as_http_client_reads_it(data, draws):
    cut = draws.draw(st.integers(0, len(data)))
    wanted = by_http_client(data)
    assert read(answer_of(data[:cut], data[cut:])) == wanted


@pytest.mark.parametrize("data", [PLAIN["a length"], ODD["LF for all line ends"]])
def test_an_end_within_the_head_is_an_error_of_the_connection(data):
    ours, theirs = socket.socketpair()
    with closing(ours), closing(theirs):
        theirs.sendall(data[:20])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(http.client.IncompleteRead):
            HttpAnswer(Incoming(ours, UnlimitedDeadline()), "POST").begin()
