"""The row `callbacks`: throughput of a callback source, and the time until it answers."""

import json
import os
import tempfile
from pathlib import Path

from tests.activation import ActivatedDaemon, HeldSocket, configure
from tests.benchmarks.consumers import program
from tests.benchmarks.measuring import cpu_secs, memory_bytes
from tests.benchmarks.report import Table, megabytes, number, percent
from tests.processes import running_system


def callbacks(effort):
    lines = [_measured(effort, connections) for connections in effort.connections]
    heads = (
        "connections",
        "events/s",
        "answer p50 ms",
        "p99 ms",
        "CPU µs/event",
        "memory",
        "the callers' CPU",
    )
    return [Table("Callbacks to a file", heads, lines)]


def _measured(effort, connections):
    with (
        tempfile.TemporaryDirectory(dir=effort.folder) as folder,
        running_system(Path(folder)) as system,
        HeldSocket() as held,
    ):
        configure(system, held)
        daemon = ActivatedDaemon(system, held)
        daemon.await_log("daemon.started", secs=60)
        _call(system, held, connections, effort.warm_secs, seed=1)
        began_secs = cpu_secs(daemon.process.pid)
        found, callers_secs = _call(system, held, connections, effort.secs, seed=2)
        used_secs = cpu_secs(daemon.process.pid) - began_secs
        return [
            str(connections),
            number(found["events"] / found["secs"]),
            number(1000 * found["p50"], 1),
            number(1000 * found["p99"], 1),
            number(used_secs / found["events"] * 1e6),
            megabytes(memory_bytes(daemon.process.pid, "VmHWM")),
            percent(callers_secs / found["secs"], 0),
        ]


def _call(system, held, connections, secs, *, seed):
    """Run the callers; returns their result and the CPU time that they used."""
    options = ("--url", held.url, "--connections", connections, "--secs", secs, "--seed", seed)
    before = os.times()
    with program("callers", *options, errors_path=system.folder / "callers.err") as process:
        result = process.stdout.readline()
        process.wait()
    assert result, (system.folder / "callers.err").read_text()
    after = os.times()
    used_secs = after.children_user + after.children_system - before.children_user - before.children_system
    return json.loads(result), used_secs
