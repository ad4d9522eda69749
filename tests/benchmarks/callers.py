"""Posts events to a URL over a number of connections at once, each event once. A program of its own.

As VOD does as far as is known: each event has a connection of its own. The next one begins as soon as one is answered.
Prints what came of it, as JSON, when its time is over.
"""

import argparse
import json
import selectors
import socket
import sys
import time
from urllib.parse import urlsplit

from tests.benchmarks.measuring import percentile
from vodpoller.simulator.bodies import EventGenerator


class Caller:
    """One event after the other, each on a new connection.

    Args:
        selector: Where it waits.
        url: The parts of the URL.
        numbers: Of the events that are left.
        generator: Makes their bodies.
    """

    def __init__(self, selector, url, numbers, generator):
        self._selector = selector
        self._url = url
        self._numbers = numbers
        self._generator = generator
        self.latencies = []
        self._post()

    def _post(self):
        body = self._generator.body(next(self._numbers), time.time())
        head = f"POST {self._url.path} HTTP/1.1\r\nHost: {self._url.netloc}\r\nContent-Length: {len(body)}\r\n\r\n"
        self._began = time.perf_counter()
        self._socket = socket.create_connection((self._url.hostname, self._url.port))
        self._socket.sendall(head.encode() + body)
        self._answer = b""
        self._selector.register(self._socket, selectors.EVENT_READ, self)

    def read(self):
        piece = self._socket.recv(65536)
        self._answer += piece
        if piece and b"\r\n\r\n" not in self._answer:
            return
        if not self._answer.startswith(b"HTTP/1.1 200 "):
            raise SystemExit(f"the answer is {self._answer!r}")
        self.latencies.append(time.perf_counter() - self._began)
        self._selector.unregister(self._socket)
        self._socket.close()
        self._post()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--connections", type=int, required=True)
    parser.add_argument("--secs", type=float, required=True)
    parser.add_argument("--seed", type=int, required=True, help="of the events' ids: another one brings other events")
    options = parser.parse_args()
    numbers, generator = iter(range(sys.maxsize)), EventGenerator(options.seed)
    with selectors.DefaultSelector() as selector:
        parts = urlsplit(options.url)
        callers = [Caller(selector, parts, numbers, generator) for _ in range(options.connections)]
        began = time.perf_counter()
        while (took_secs := time.perf_counter() - began) < options.secs:
            for ready, _ in selector.select(0.1):
                ready.data.read()
    latencies = [latency for caller in callers for latency in caller.latencies]
    found = {"p50": percentile(latencies, 0.5), "p99": percentile(latencies, 0.99)}
    sys.stdout.write(json.dumps({"events": len(latencies), "secs": took_secs, **found}) + "\n")


if __name__ == "__main__":
    main()
