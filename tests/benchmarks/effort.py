"""How much is measured, and in which order."""

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
        folder: Folder for the files of all consumers: its disk is part of the measurement.
        secs: Length of each window of the steady state.
        warm_secs: Time between the first confirm and the start of the window.
        idle_secs: Length of the window in the row `idle`.
        pulls: The values of `max_concurrent_pulls` to try.
        connections: Numbers of callbacks to send at once.
        backlogs: Sizes of the backlogs to drain.
        stored_backlog: Number of stored events that a receiver gets when it is back.
        stored_events: Number of events in a large journal, and of lines in a file to recover.
        starts: Number of starts of `run`.
        repeats: Number of runs of each comparison; the run with the median CPU time per event is reported.
        baseline: The `vodpoller` of another version, measured alternately with this one; None for none.
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
    """Measure the consumers alternately; returns all measurements of each consumer.

    Args:
        effort: Its `repeats` is the number of rounds.
        consumers: The consumers to measure.
        measure: Measures one consumer, once.
    """
    # The load by other processes changes over time; alternating exposes all consumers to the same load.
    rounds = [[measure(consumer) for consumer in consumers] for _ in range(effort.repeats)]
    return list(zip(*rounds, strict=True))


def versions(effort, consumer):
    """The consumer and, if it is vodpoller, the baseline with the same configuration."""
    if effort.baseline is None or not isinstance(consumer, Vodpoller):
        return [consumer]
    return [consumer, replace(consumer, program=effort.baseline, label=f"{consumer.label}, baseline")]
