"""Daemons with a callback source whose socket stays open across restarts, as a socket unit of systemd keeps it."""

import os
import socket
import subprocess
import sys

from tests.processes import DaemonProcess, environment

# LISTEN_PID must name the pid of the daemon (sd_listen_fds(3)). `execv` keeps the pid of this program.
_PASS_ON = """
import os, sys
held = int(sys.argv[1])
os.dup2(held, 3)
if held != 3:
    os.close(held)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.execv(sys.executable, [sys.executable, "-m", "vodpoller", *sys.argv[2:]])
"""


class HeldSocket:
    """A listening socket that accepts nothing: connections wait for the daemon that gets it. A context manager."""

    def __init__(self):
        # The same backlog as in vodpoller.socket.
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.url = f"http://{self.address}/vod"

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self._socket.close()

    def fileno(self):
        return self._socket.fileno()


class ActivatedDaemon(DaemonProcess):
    """`vodpoller run` to which a held socket is passed.

    Args:
        system: Holds the configuration; the log is written to its folder.
        held: The socket.
        log_name: Name of the log file.
    """

    def __init__(self, system, held, *, log_name="daemon.log"):
        self.log_path = system.folder / log_name
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _PASS_ON, str(held.fileno()), "run", "-c", os.fspath(system.config_path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env=environment(),
                pass_fds=[held.fileno()],
            )
        system.kill_at_end(self)


def configure(system, held, *, source="", sinks=None, more=""):
    """Write a configuration with one callback source, whose events go to all sinks.

    Args:
        system: The configuration is written to its `config_path`.
        held: The socket on which the source listens.
        source: Further lines of the source.
        sinks: The tables of the sinks; None for one file sink, named archive.
        more: Further tables.
    """
    sinks = system.archive_sink if sinks is None else sinks
    names = [line.removeprefix("[sinks.").rstrip("]") for line in sinks.splitlines() if line.startswith("[sinks.")]
    system.config_path.write_text(
        f'[[sources]]\nname = "pushed"\ntype = "callback"\nlisten = "{held.address}"\npath = "/vod"\n'
        f'unrouted = "dead_letter"\n{source}\n[[routes]]\nname = "all"\nsinks = {names}\n{sinks}\n'
        f'[journal]\npath = "{system.journal}"\n{more}\n'
    )
