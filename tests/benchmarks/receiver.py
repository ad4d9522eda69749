"""A webhook's receiver that answers every POST after a fixed time, on any number of connections. A separate program.

It prints its URL. One thread: waiting needs no CPU time, so that the receiver does not limit the result. A GET returns
the counts so far, as JSON.
"""

import argparse
import asyncio
import json
import re
import time
from contextlib import suppress

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ID = re.compile(rb"webhook-id: *(\w+)", re.IGNORECASE)
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Counts:
    """Counts of the requests so far."""

    def __init__(self):
        self._requests = 0
        self._ids = set()
        self._first_at = self._last_at = 0.0

    def note(self, head):
        self._requests += 1
        self._ids.add(bytes.fromhex(_ID.search(head)[1].decode()))
        self._last_at = time.time()
        self._first_at = self._first_at or self._last_at

    def answer(self):
        counts = {
            "requests": self._requests,
            "events": len(self._ids),
            "first_at": self._first_at,
            "last_at": self._last_at,
        }
        body = json.dumps(counts).encode()
        return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


class Connection(asyncio.Protocol):
    def __init__(self, answer_secs, counts):
        self._answer_secs = answer_secs
        self._counts = counts
        self._buffer = b""
        self._transport = None

    def connection_made(self, transport):
        self._transport = transport

    def data_received(self, data):
        self._buffer += data
        head, gap, body = self._buffer.partition(b"\r\n\r\n")
        if gap and head.startswith(b"GET "):
            self._buffer = b""
            self._transport.write(self._counts.answer())
        elif gap and len(body) >= int(_LENGTH.search(head)[1]):
            self._buffer = b""
            self._counts.note(head)
            asyncio.get_running_loop().call_later(self._answer_secs, self._answer)

    def _answer(self):
        if not self._transport.is_closing():
            self._transport.write(_ANSWER)


async def serve(answer_secs):
    counts = Counts()
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(answer_secs, counts), "127.0.0.1", 0, backlog=1024
    )
    async with server:
        print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/callback", flush=True)  # noqa: T201 - for the parent
        await server.serve_forever()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answer-secs", type=float, required=True)
    options = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(serve(options.answer_secs))


if __name__ == "__main__":
    main()
