"""A TCP proxy that cuts a connection at a COMMIT: before the server gets it, or before the client gets the answer."""

import select
import socket
import threading
from contextlib import closing, suppress

CHUNK_BYTES = 1 << 16


class CuttingProxy:
    """A proxy between a client and a server on this machine; a context manager.

    Args:
        port: Port of the server.

    Attributes:
        port: Port on which the proxy listens.
        cuts: For each of the next COMMITs "before" or "after": the connection is cut there. Later ones are passed on.
    """

    def __init__(self, port):
        self._server_port = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._threads = [threading.Thread(target=self._accept)]
        self.port = self._listening.getsockname()[1]
        self.cuts = []

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_exception):
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        for thread in self._threads:
            thread.join()

    def _accept(self):
        with suppress(OSError):
            while True:
                client, _ = self._listening.accept()
                thread = threading.Thread(target=self._pass_on, args=(client,))
                self._threads.append(thread)
                thread.start()

    def _pass_on(self, client):
        server = socket.create_connection(("127.0.0.1", self._server_port))
        with closing(client), closing(server), suppress(OSError):
            while True:
                for ready in select.select([client, server], [], [])[0]:
                    data = ready.recv(CHUNK_BYTES)
                    if not data:
                        return
                    is_commit = ready is client and data.rstrip(b"\0").endswith(b"COMMIT")
                    cut = self.cuts.pop(0) if is_commit and self.cuts else None
                    if cut == "before":
                        return
                    (server if ready is client else client).sendall(data)
                    if cut == "after":
                        server.recv(CHUNK_BYTES)  # the answer shows that the commit is done
                        return
