"""Posts events to a URL over several connections at once, each event once. A separate program.

As far as is known, it does what VOD does: each event has its own connection. The next one begins as soon as one is
answered. When its time is over it prints the counts and latencies, as JSON.
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
    """Posts one event after the other, each on a new connection.

    Args:
        selector: Waits for the answers of all callers.
        url: The parts of the URL.
        numbers: Yields the numbers of the next events; all callers share it.
        generator: Makes the bodies.
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
    parser.add_argument("--seed", type=int, required=True, help="random seed of the events' ids")
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
