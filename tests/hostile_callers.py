"""Clients of a callback listener that are not VOD: scanners, misdirected clients and attackers."""

import socket
import threading
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.measuring import memory_bytes

PAUSE_SECS = 0.02


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What such a client sends.

    Args:
        opening: The first bytes.
        piece: Bytes that it then sends repeatedly; empty if it waits until the server closes the connection.
        hangs_up: Whether it closes the connection as soon as the opening is sent.
    """

    opening: bytes
    piece: bytes = b""
    hangs_up: bool = False


def post(body, path="/vod", method="POST"):
    head = f"{method} {path} HTTP/1.1\r\nHost: vod\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


HEAD = b"POST /vod HTTP/1.1\r\nHost: vod\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CHUNK = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
KINDS = {
    "wrong path": Kind(opening=post(b"{}", path="/wp-login.php")),
    "wrong method": Kind(opening=post(b"", method="GET")),
    "not HTTP": Kind(opening=b"SSH-2.0-OpenSSH_9.6\r\n"),
    "TLS": Kind(opening=bytes.fromhex("16030100c8010000c40303") + b"\x5a" * 200),
    "HTTP/2": Kind(opening=b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00" * 30),
    "not JSON": Kind(opening=post(b"\xff" * 1000)),
    "deep JSON": Kind(opening=post(b'{"a":' * 100_000)),
    "not an object": Kind(opening=post(b"[1,2,3]")),
    "announced too large": Kind(opening=HEAD + b"Content-Length: 99999999999\r\n\r\n", piece=b"x" * 0x4000),
    "endless chunks": Kind(opening=CHUNKED, piece=CHUNK),
    "chunks of a byte": Kind(opening=CHUNKED, piece=b"1\r\nx\r\n"),
    "a wrong chunk": Kind(opening=CHUNKED + b"zz\r\n"),
    "two lengths": Kind(opening=HEAD + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "huge head": Kind(opening=HEAD + b"X: " + b"x" * 1_000_000),
    "many headers": Kind(opening=HEAD + b"X: y\r\n" * 50_000),
    "trickling head": Kind(opening=HEAD + b"X: ", piece=b"x"),
    "trickling body": Kind(opening=HEAD + b"Content-Length: 100000\r\n\r\n{", piece=b" "),
    "nothing": Kind(opening=b""),
    "port scan": Kind(opening=b"", hangs_up=True),
    "half a body": Kind(opening=HEAD + b'Content-Length: 100\r\n\r\n{"EventType":', hangs_up=True),
    "no patience": Kind(opening=post(b'{"EventType":"Late"}')[:-1], hangs_up=True),
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Memory and number of open files of a process."""

    memory_bytes: int
    open_files: int

    @classmethod
    def of(cls, pid):
        open_files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return cls(memory_bytes=memory_bytes(pid, "VmRSS"), open_files=open_files)


@contextmanager
def hostile(address, kinds, *, clients):
    """Run clients of these kinds, each of which connects repeatedly.

    Args:
        address: Host and port.
        kinds: Names of `KINDS`.
        clients: The number of clients of each kind.

    Yields:
        A function that returns the number of finished connections of each kind.
    """
    ended = threading.Event()
    counts = dict.fromkeys(kinds, 0)

    def keep_connecting(name):
        while not ended.wait(PAUSE_SECS):
            with suppress(OSError), closing(socket.create_connection(address, timeout=20)) as connection:
                _send(connection, KINDS[name], ended)
            counts[name] += 1

    threads = [threading.Thread(target=keep_connecting, args=(name,)) for name in kinds for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield lambda: dict(counts)
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def _send(connection, kind, ended):
    connection.sendall(kind.opening)
    if kind.hangs_up:
        return
    connection.settimeout(PAUSE_SECS)
    while not ended.is_set():
        with suppress(TimeoutError):
            if kind.piece:
                connection.sendall(kind.piece)
            if not connection.recv(65536):
                return


def sizes_settle(pid, before, *, secs=30.0):
    """The sizes as soon as no more files are open than before, or after `secs` at the latest."""
    ends_at = time.monotonic() + secs
    while (now := Sizes.of(pid)).open_files > before.open_files and time.monotonic() < ends_at:
        time.sleep(0.1)
    return now
