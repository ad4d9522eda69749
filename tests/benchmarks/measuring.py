"""Reads the numbers of processes, of the simulator and of a growing file."""

import math
import os
import re
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import requests

_TICKS_PER_SEC = os.sysconf("SC_CLK_TCK")
_BORN = re.compile(rb"[?]born=([0-9.]+)")


def cpu_secs(pid):
    """User and system CPU time of a process with all its threads, since its start."""
    # The name of the program, in parentheses, may hold blanks; utime and stime are fields 14 and 15 (proc(5)).
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS_PER_SEC


def machine_cpu_secs():
    """CPU time of all processes since the boot, including time that the hypervisor gave to other machines."""
    # user, nice, system, then idle and iowait, then irq, softirq, steal (proc(5)).
    fields = [int(field) for field in Path("/proc/stat").read_text().partition("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICKS_PER_SEC


def memory_bytes(pid, name):
    """VmHWM (peak) or VmRSS (current) of a process."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return int(found[1]) * 1024


@dataclass(frozen=True, kw_only=True)
class Moment:
    """The numbers of a consumer and of its simulator at one moment."""

    at: float
    wall: float
    cpu_secs: float
    simulator_cpu_secs: float
    machine_cpu_secs: float
    stats: dict

    @classmethod
    def now(cls, consumer, simulator):
        # The simulator first: its answer may be late, and the other numbers must be of the moment of the answer.
        stats = simulator.stats()
        return cls(
            at=time.monotonic(),
            wall=time.time(),
            cpu_secs=cpu_secs(consumer.pid),
            simulator_cpu_secs=cpu_secs(simulator.process.pid),
            machine_cpu_secs=machine_cpu_secs(),
            stats=stats,
        )


@dataclass(frozen=True, kw_only=True)
class Window:
    """What happened between two moments."""

    began: Moment
    ended: Moment

    def _grown(self, name):
        """Increase of a simulator's count in the window."""
        return self.ended.stats[name] - self.began.stats[name]

    def grown(self, group, name):
        """Increase of a count in a group; a group has no entry for what has not happened yet."""
        return self.ended.stats[group].get(name, 0) - self.began.stats[group].get(name, 0)

    @property
    def secs(self):
        return self.ended.at - self.began.at

    @property
    def events(self):
        return self._grown("confirmed")

    @property
    def events_per_sec(self):
        return self.events / self.secs

    @property
    def cpu_secs(self):
        return self.ended.cpu_secs - self.began.cpu_secs

    @property
    def cpu_us_per_event(self):
        return self.cpu_secs / self.events * 1e6 if self.events else math.nan

    @property
    def _simulator_cpu_secs(self):
        return self.ended.simulator_cpu_secs - self.began.simulator_cpu_secs

    @property
    def simulator_cpu_share(self):
        """The simulator's CPU time as a share of one core."""
        return self._simulator_cpu_secs / self.secs

    @property
    def simulator_cpu_us_per_event(self):
        return self._simulator_cpu_secs / self.events * 1e6 if self.events else math.nan

    @property
    def other_cpu_share(self):
        """CPU time of all other processes as a share of one core; it should be near 0."""
        used_secs = self.ended.machine_cpu_secs - self.began.machine_cpu_secs
        return max(used_secs - self.cpu_secs - self._simulator_cpu_secs, 0.0) / self.secs

    @property
    def requests(self):
        return sum(self.ended.stats["requests"].values()) - sum(self.began.stats["requests"].values())

    @property
    def refused(self):
        """Requests beyond the quota."""
        return self._grown("refused_by_limit")

    @property
    def refused_share(self):
        return self.refused / self.requests if self.requests else 0.0

    @property
    def ran_dry(self):
        """Whether the backlog was used up before the end, so that the numbers are useless."""
        return not self.ended.stats["visible"]


def watch(consumer, simulator, *, secs):
    """Measure for `secs`; returns the window."""
    began = Moment.now(consumer, simulator)
    time.sleep(secs)
    return Window(began=began, ended=Moment.now(consumer, simulator))


def percentile(values, share):
    """The value at this share of the sorted values; NaN if there are none."""
    ordered = sorted(values)
    return ordered[round((len(ordered) - 1) * share)] if ordered else math.nan


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Two percentiles, in seconds."""

    p50: float
    p99: float

    @classmethod
    def of(cls, values):
        return cls(p50=percentile(values, 0.5), p99=percentile(values, 0.99))


def ledger_part(simulator, start, count):
    """The simulator's ledger rows of `count` events from number `start` on."""
    with requests.Session() as session:
        session.trust_env = False
        return session.get(f"{simulator.url}/_ledger?from={start}&n={count}", timeout=60).json()


def births_to_confirm(simulator, window, *, grace_secs=10.0):
    """Latencies of the events that were born in the window; infinite if still unconfirmed after `grace_secs`."""
    first, last = window.began.stats["fed"], window.ended.stats["fed"]
    ends_at = time.monotonic() + grace_secs
    while True:
        rows = ledger_part(simulator, first, last - first)
        if time.monotonic() >= ends_at or all(row["confirmed_at"] for row in rows):
            return [(row["confirmed_at"] or math.inf) - row["born"] for row in rows]
        time.sleep(0.25)


class Tail:
    """Reads a growing file and records when each line could be read. A context manager.

    Args:
        path: The file; it is created if it is missing.
        every_secs: Pause between two reads; the recorded times are late by half of it on average.
    """

    def __init__(self, path, *, every_secs=0.0005):
        self._fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._every_secs = every_secs
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._follow)
        self._pieces = []

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_exception):
        self._stopped.set()
        self._thread.join()
        os.close(self._fd)

    def _follow(self):
        # Nothing is parsed during the measurement: on a small machine that would affect the result.
        while not self._stopped.is_set():
            if piece := os.read(self._fd, 1 << 20):
                self._pieces.append((time.time(), piece))
            else:
                time.sleep(self._every_secs)

    def births_to_line(self, window):
        """The latencies of the snapshot events that were born in the window, in seconds."""
        latencies = []
        rest = b""
        for seen_at, piece in list(self._pieces):
            *lines, rest = (rest + piece).split(b"\n")
            births = (float(found[1]) for line in lines if (found := _BORN.search(line)))
            latencies += [seen_at - born for born in births if window.began.wall <= born < window.ended.wall]
        return latencies
