"""Starts processes of vodpoller without the half second that importing it takes: a process that has imported it forks.

What is started differs from a process of its own in nothing that it does: it has its own arguments, environment, folder
and streams, and ends as any process does. It only does not take apart what was imported at its end: that would copy the
memory which it shares, two thirds of the time of a short command. What the interpreter reads before the first line of a
program (the locale, `PYTHON...`) is that of the tests; `start` starts one in the usual way if a test changes that.
"""

import atexit
import functools
import gc
import importlib
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BEFORE_THE_FIRST_LINE = ("PYTHON", "LC_", "LANG")
CLOSED = -4  # beside subprocess.PIPE, STDOUT and DEVNULL
NEVER_FORK = threading.Event()  # set for measurements: a fork starts sooner, shares memory and has imported more


class WarmProcess:
    """A process that was started, with what is used of `subprocess.Popen`.

    Args:
        control: Brings its pid, and its exit code when it has ended.
    """

    def __init__(self, control):
        self._control = control
        self._said = control.makefile("rb")
        self.pid = int(self._said.readline())
        self.returncode = None

    def poll(self):
        if self.returncode is None and select.select([self._control], [], [], 0)[0]:
            self._end()
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if not select.select([self._control], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            self._end()
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def _end(self):
        self.returncode = int(self._said.readline())
        self._said.close()
        self._control.close()


def start(module, args, *, env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL):
    """Start `python -m MODULE ARGS`.

    Args:
        module: One that has been imported, or is quick to.
        args: Its arguments.
        env: Its whole environment.
        stdin: A file, `subprocess.DEVNULL`, or CLOSED.
        stdout: As stdin.
        stderr: As stdin.
    """
    command = [sys.executable, "-m", module, *map(str, args)]
    asked = (stdin, stdout, stderr)
    if NEVER_FORK.is_set() or _before_the_first_line(env) != _before_the_first_line((warm := _the_warm_process()).env):
        assert CLOSED not in asked, "only what is forked can be started with a closed stream"
        return subprocess.Popen(command, env=env, stdin=stdin, stdout=stdout, stderr=stderr)
    sys.audit("subprocess.Popen", sys.executable, command, None, env)
    ours, theirs = socket.socketpair()
    with open(os.devnull, "r+b") as devnull, theirs:  # noqa: PTH123 - for a descriptor
        streams = [devnull if stream in (subprocess.DEVNULL, CLOSED) else stream for stream in asked]
        closed = [number for number, stream in enumerate(asked) if stream == CLOSED]
        request = {"module": module, "args": command[2:], "env": env, "folder": str(Path.cwd()), "closed": closed}
        warm.ask(request, [theirs.fileno(), *(stream.fileno() for stream in streams)])
    return WarmProcess(ours)


def _before_the_first_line(env):
    return {name: value for name, value in env.items() if name.startswith(BEFORE_THE_FIRST_LINE)}


class _Warm:
    """The process that forks. It ends with this one."""

    def __init__(self):
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self._lock = threading.Lock()
        self._requests, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.warm", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=self.env,
                pass_fds=[theirs.fileno()],
            )
        atexit.register(self._end)

    def ask(self, request, fds):
        data = json.dumps(request).encode(errors="surrogateescape")
        with self._lock:
            socket.send_fds(self._requests, [len(data).to_bytes(4)], fds)
            self._requests.sendall(data)

    def _end(self):
        self._requests.close()
        self._process.wait()


_the_warm_process = functools.cache(_Warm)


# --- the process that forks -------------------------------------------------------------------------------------------


def _serve(requests):
    """Fork for each request. Returns in what was forked, with the request; ends with the process that asks."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        head, fds, _, _ = socket.recv_fds(requests, 4, 4)
        if not head:
            sys.exit()
        data = b""
        while len(data) < int.from_bytes(head):
            data += requests.recv(1 << 16)
        if os.fork() == 0:
            requests.close()
            return json.loads(data.decode(errors="surrogateescape")), fds
        for fd in fds:
            os.close(fd)


def _start(request, fds):
    """Start what was asked for; only that returns, its parent waits for it here and tells how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control, *streams = fds
    if pid := os.fork():
        for fd in (*streams, 0, 1, 2):
            os.close(fd)
        os.write(control, b"%d\n" % pid)
        _, status = os.waitpid(pid, 0)
        os.write(control, b"%d\n" % os.waitstatus_to_exitcode(status))
        os._exit(0)
    for number, (fd, name) in enumerate(zip(streams, ("stdin", "stdout", "stderr"), strict=True)):
        if number in request["closed"]:
            os.close(number)
            setattr(sys, name, None)  # as the interpreter does
            setattr(sys, f"__{name}__", None)
        else:
            os.dup2(fd, number)
            _open_stream(name, number)
    os.closerange(3, 256)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    sys.argv = request["args"]


def _open_stream(name, number):
    """As the interpreter does at its start: what it found then of the descriptor does not hold any more."""
    old = getattr(sys, name)
    stream = open(number, old.mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115 - for the whole life
    stream.reconfigure(line_buffering=name == "stderr" or stream.isatty())
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)


def _run(module):
    code = None

    @atexit.register  # before what the program registers, so that it is called after that
    def end():
        try:
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
        except (OSError, ValueError):
            return  # the interpreter has an exit code for that
        if code is not None:
            os._exit(code)

    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as ended:
        if ended.code is None or isinstance(ended.code, int):
            code = (ended.code or 0) & 0xFF
        raise


def _import_all():
    package = importlib.import_module("vodpoller")
    for module in pkgutil.walk_packages(package.__path__, "vodpoller."):
        if not module.name.endswith("__main__") and module.name != "vodpoller.testing":
            importlib.import_module(module.name)


if __name__ == "__main__":
    _import_all()
    gc.freeze()  # a collection would copy all of the pages that processes share
    request, fds = _serve(socket.socket(fileno=int(sys.argv[1])))
    _start(request, fds)
    _run(request["module"])
