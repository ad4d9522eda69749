"""A webhook's receiver that answers every POST after a while, on any number of connections. A program of its own.

Prints its URL. One thread: waiting costs it nothing, so that it is not what is measured.
"""

import argparse
import asyncio
import re
from contextlib import suppress

_LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)
_ANSWER = b"HTTP/1.1 204 No Content\r\n\r\n"


class Connection(asyncio.Protocol):
    def __init__(self, answer_secs):
        self._answer_secs = answer_secs
        self._buffer = b""
        self._transport = None

    def connection_made(self, transport):
        self._transport = transport

    def data_received(self, data):
        self._buffer += data
        head, gap, body = self._buffer.partition(b"\r\n\r\n")
        if gap and len(body) >= int(_LENGTH.search(head)[1]):
            self._buffer = b""
            asyncio.get_running_loop().call_later(self._answer_secs, self._answer)

    def _answer(self):
        if not self._transport.is_closing():
            self._transport.write(_ANSWER)


async def serve(answer_secs):
    server = await asyncio.get_running_loop().create_server(
        lambda: Connection(answer_secs), "127.0.0.1", 0, backlog=1024
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
