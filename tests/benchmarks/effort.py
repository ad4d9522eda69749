"""How much is measured, and in which turns."""

import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from tests.benchmarks.consumers import Vodpoller
from tests.processes import running_system


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is measured.

    Args:
        folder: Where the files of all consumers are: its disk is part of what is measured.
        secs: How long each window of the steady state is.
        warm_secs: How long after the first confirm it begins.
        idle_secs: The same for the row of that name.
        pulls: The values of `max_concurrent_pulls` to try.
        connections: Numbers of callbacks to send at once.
        backlogs: The backlogs to drain.
        stored_backlog: The number of stored events that a receiver gets when it is back.
        stored_events: The number of events that a large journal holds, and of lines in a file to recover.
        starts: How often `run` is started.
        repeats: How often each comparison is made, in turns; the one of the median CPU time per event counts.
        baseline: The `vodpoller` of another version, which is then measured in turns with this one; None for none.
    """

    folder: Path
    secs: float = 10.0
    warm_secs: float = 2.0
    idle_secs: float = 30.0
    pulls: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    connections: tuple[int, ...] = (1, 8, 64)
    backlogs: tuple[int, ...] = (1000, 10_000, 100_000, 200_000)
    stored_backlog: int = 100_000
    stored_events: int = 1_000_000
    starts: int = 3
    repeats: int = 1
    baseline: Path | None = None


@contextmanager
def fresh_system(effort):
    with tempfile.TemporaryDirectory(dir=effort.folder) as folder, running_system(Path(folder)) as system:
        yield system


def say(text):
    sys.stderr.write(text + "\n")


def in_turns(effort, consumers, measure):
    """All measurements of each consumer.

    Args:
        effort: Says how often.
        consumers: What is measured.
        measure: Measures one consumer, once.
    """
    # In turns: what else the machine does changes with the minute, and must hit all of them alike.
    rounds = [[measure(consumer) for consumer in consumers] for _ in range(effort.repeats)]
    return list(zip(*rounds, strict=True))


def versions(effort, consumer):
    """The consumer, and if it is vodpoller, the baseline in the same configuration."""
    if effort.baseline is None or not isinstance(consumer, Vodpoller):
        return [consumer]
    return [consumer, replace(consumer, program=effort.baseline, label=f"{consumer.label}, baseline")]
