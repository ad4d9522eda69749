"""Certificates that no public CA has signed, and servers that use them."""

import ssl
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.processes import needs


@dataclass(frozen=True)
class Certificate:
    path: Path
    key: Path

    def context(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path, self.key)
        return context

    def serve(self, receiver):
        """Switch the receiver to TLS; returns its new URL."""
        receiver.socket = self.context().wrap_socket(receiver.socket, server_side=True)
        return receiver.url.replace("http:", "https:")


def make_certificate(folder, names="IP:127.0.0.1", days=2):
    """A new self-signed certificate in this folder."""
    needs("openssl")
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} -subj /CN=receiver"
    files = ["-addext", f"subjectAltName={names}", "-keyout", str(made.key), "-out", str(made.path)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return made
