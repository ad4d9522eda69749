"""Certificates that no public CA vouches for, and servers that show them."""

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
        """The receiver speaks TLS from now on, at the URL that comes back."""
        receiver.socket = self.context().wrap_socket(receiver.socket, server_side=True)
        return receiver.url.replace("http:", "https:")


def make_certificate(folder, names="IP:127.0.0.1", days=2):
    """A new one that has signed itself."""
    needs("openssl")
    made = Certificate(folder / "certificate.pem", folder / "key.pem")
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days {days} -subj /CN=receiver"
    files = ["-addext", f"subjectAltName={names}", "-keyout", str(made.key), "-out", str(made.path)]
    subprocess.run([*command.split(), *files], check=True, capture_output=True)
    return made
