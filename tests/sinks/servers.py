"""Database servers for tests: each runs on a free port as a user without rights; tests kill, freeze and restart it.

A server that a worker of pytest has started is used for all tests of this worker, and ends with it.
"""

import atexit
import functools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psycopg
import pymysql

from tests.as_nobody import NOBODY
from tests.polling import until
from tests.processes import cannot_run

MAX_WAIT_SECS = 60.0
POSTGRESQL_FOLDERS = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


def free_port():
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        return server.getsockname()[1]


def program(*names):
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", *map(str, POSTGRESQL_FOLDERS)])
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    return cannot_run(f"{names[0]} is not installed")


class Server:
    """A database server in its own folder.

    Attributes:
        port: Port on which it listens, also after a restart.
    """

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="server-", dir="/tmp"))
        # Neither PostgreSQL nor MariaDB serves root.
        self._as_user = {"user": NOBODY, "group": NOBODY, "extra_groups": []} if os.geteuid() == 0 else {}
        if self._as_user:
            os.chown(self.folder, NOBODY, NOBODY)
        self.port = free_port()
        self._process = None
        try:
            self.prepare()
            self.start()
        except BaseException:
            self.end()
            raise

    def prepare(self):
        raise NotImplementedError

    def command(self):
        raise NotImplementedError

    def is_up(self):
        raise NotImplementedError

    def start(self):
        """Start the server; returns when it accepts connections."""
        until(self._has_begun, secs=MAX_WAIT_SECS, what=self.tail)

    def _has_begun(self):
        # For a moment, remains of a killed server may prevent the start.
        if self._process is None or self._process.poll() is not None:
            with (self.folder / "log").open("ab") as log:
                self._process = self._begin(self.command(), stdout=log, stderr=log)
        return self.is_up()

    def tail(self):
        return (self.folder / "log").read_text(errors="replace")[-2000:]

    def kill(self):
        """Send SIGKILL, also to its child processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()

    def freeze(self):
        """Send SIGSTOP: connections stay open, and nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self):
        self._signal(signal.SIGCONT)

    def _signal(self, number):
        pid = self._process.pid
        helpers = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for each in (pid, *map(int, helpers)):  # each helper of PostgreSQL has a process group of its own
            with suppress(ProcessLookupError):
                os.kill(each, number)

    def end(self):
        if self._process is not None:
            with suppress(OSError):
                self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _begin(self, command, **streams):
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "LC_ALL": "C", "TMPDIR": str(self.folder)}
        return subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.DEVNULL,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
            **streams,
            **self._as_user,
        )

    def _run(self, *command):
        process = self._begin(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        output, _ = process.communicate(timeout=MAX_WAIT_SECS)
        assert process.returncode == 0, output


@contextmanager
def ending(server):
    """A server that ends with the block."""
    try:
        yield server
    finally:
        server.end()


class Postgresql(Server):
    def prepare(self):
        self._run(program("initdb"), "-D", self.folder / "data", "-U", "app", "-A", "trust", "-E", "UTF8", "--no-sync")

    def command(self):
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self.folder,
            "shared_buffers": "16MB",
            "max_connections": 100,
        }
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        return [program("postgres"), "-D", self.folder / "data", "-p", self.port, *options]

    @property
    def dsn(self):
        return self.dsn_at(self.port)

    def dsn_at(self, port):
        return f"host=127.0.0.1 port={port} user=app dbname=postgres"

    def connect(self):
        return psycopg.connect(self.dsn, autocommit=True)

    def as_admin(self, sql):
        with self.connect() as db:
            db.execute("SET default_transaction_read_only = off")
            db.execute(sql)

    def is_up(self):
        with suppress(psycopg.OperationalError):
            self.connect().close()
            return True


class Mariadb(Server):
    def prepare(self):
        self._run(
            program("mariadb-install-db", "mysql_install_db"),
            "--no-defaults",
            f"--datadir={self.folder}/data",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        )

    def command(self):
        return [
            program("mariadbd", "mysqld"),
            "--no-defaults",
            f"--datadir={self.folder}/data",
            f"--socket={self.folder}/socket",
            f"--pid-file={self.folder}/pid",
            f"--port={self.port}",
            "--bind-address=127.0.0.1",
            "--innodb-buffer-pool-size=16M",
        ]

    @property
    def dsn(self):
        return self.dsn_at(self.port)

    def dsn_at(self, port):
        return f"mysql://app:hunter2@127.0.0.1:{port}/app"

    def connect(self):
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user="app", password="hunter2", database="app", autocommit=True
        )

    def as_admin(self, sql):
        with self._as_root() as root, root.cursor() as cursor:
            cursor.execute(sql)

    def is_up(self):
        if not self._listens():
            return False
        with suppress(pymysql.OperationalError), self._as_root() as root, root.cursor() as cursor:
            cursor.execute("CREATE DATABASE IF NOT EXISTS app CHARACTER SET utf8mb4")
            cursor.execute("CREATE USER IF NOT EXISTS app@'127.0.0.1' IDENTIFIED BY 'hunter2'")
            cursor.execute("GRANT ALL ON app.* TO app@'127.0.0.1'")
            return True

    def _listens(self):
        """Tried first, since PyMySQL does not close its socket if the connection is refused."""
        with socket.socket(socket.AF_UNIX) as trying, suppress(OSError):
            trying.connect(f"{self.folder}/socket")
            return True

    def _as_root(self):
        return pymysql.connect(unix_socket=f"{self.folder}/socket", user="root", autocommit=True)


def _kept(kind):
    server = kind()
    atexit.register(server.end)
    return server


@functools.cache
def postgresql():
    """The server of this worker."""
    return _kept(Postgresql)


@functools.cache
def mariadb():
    """The server of this worker."""
    return _kept(Mariadb)
