"""Markdown tables of the results, and a description of the machine."""

import math
import os
import platform
import sqlite3
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from vodpoller import __version__

_PACKAGES = ("tencentcloud-sdk-python-common", "requests", "urllib3", "orjson", "structlog", "apscheduler", "pydantic")


@dataclass(frozen=True)
class Table:
    """A title, the heads of the columns, and lines of cells that are text already."""

    title: str
    heads: tuple
    lines: list

    def markdown(self):
        rows = [self.heads, ["---"] + ["---:"] * (len(self.heads) - 1), *self.lines]
        return "\n".join([f"### {self.title}", "", *(f"| {' | '.join(row)} |" for row in rows), ""])


def number(value, digits=0, unit=""):
    """A cell; a dash without a value."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.{digits}f}{unit}"


def percent(share, digits=1):
    return number(None if share is None else 100 * share, digits, "%")


def megabytes(size):
    return number(size / 1e6, 1, " MB")


def milliseconds(latency):
    """p50 and p99 in one cell."""
    if latency is None:
        return "-"
    return f"{number(1000 * latency.p50, 1)} / {number(1000 * latency.p99, 1)}"


def machine(folder):
    """The machine and the versions, as a markdown list."""
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return "\n".join(
        [
            f"- {_cpu_model()}, {os.cpu_count()} cores; load before the start {os.getloadavg()[0]:.2f}",
            f"- {platform.system()} {platform.release()}, Python {platform.python_version()}",
            f"- write and fdatasync of 8 KiB in {folder}: {1000 * _sync_secs(folder):.2f} ms (median of 50)",
            f"- vodpoller {__version__}; {versions}, SQLite {sqlite3.sqlite_version}",
            "",
        ]
    )


def _cpu_model():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


def _sync_secs(folder):
    path = folder / "sync"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    took = []
    try:
        for _ in range(50):
            began = time.perf_counter()
            os.write(fd, b"x" * 8192)
            os.fdatasync(fd)
            took.append(time.perf_counter() - began)
    finally:
        os.close(fd)
        path.unlink()
    return sorted(took)[25]
