"""The consumer with the least work: bytes over sockets, nothing parsed, nothing kept. A separate program.

Several connections, each of which sends the next request as soon as it has its answer, so that the simulator always has
work: their throughput is the simulator's maximum.
"""

import argparse
import re
import selectors
import socket

_HEAD = (
    b"POST / HTTP/1.1\r\nHost: simulator\r\nContent-Type: application/json\r\n"
    b"Authorization: none\r\nX-TC-Action: %b\r\nX-TC-Version: 2018-07-17\r\nX-TC-Timestamp: 0\r\n"
    b"Content-Length: %d\r\n\r\n%b"
)
_LENGTH = re.compile(rb"Content-Length: (\d+)")
_HANDLE = re.compile(rb'"EventHandle":("[0-9a-f]{32}")')


class Connection:
    """Pulls and confirms alternately; each request is sent as soon as the previous answer has arrived."""

    def __init__(self, address):
        self.socket = socket.create_connection(address)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._answer = b""
        self._send(b"PullEvents", b"{}")

    def _send(self, action, body):
        self._is_pull = action == b"PullEvents"
        self.socket.sendall(_HEAD % (action, len(body), body))

    def read(self):
        piece = self.socket.recv(1 << 18)
        if not piece:
            raise SystemExit("the simulator closed the connection")
        self._answer += piece
        head, gap, body = self._answer.partition(b"\r\n\r\n")
        if gap and len(body) == int(_LENGTH.search(head)[1]):
            self._answer = b""
            self._send_next(body)

    def _send_next(self, body):
        if not self._is_pull:
            self._send(b"PullEvents", b"{}")
        elif handles := _HANDLE.findall(body):
            self._send(b"ConfirmEvents", b'{"EventHandles":[%b]}' % b",".join(handles))
        else:
            raise SystemExit("the simulator has run out of events")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="host:port of the simulator")
    parser.add_argument("--connections", type=int, default=8)
    options = parser.parse_args()
    host, port = options.endpoint.split(":")
    with selectors.DefaultSelector() as selector:
        for _ in range(options.connections):
            connection = Connection((host, int(port)))
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        while True:
            for ready, _ in selector.select():
                ready.data.read()


if __name__ == "__main__":
    main()
