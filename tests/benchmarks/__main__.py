"""The command `python -m tests.benchmarks`; see the package's docstring."""

import argparse
import dataclasses
import os
import sys
import tempfile
import time
from pathlib import Path

from tests import benchmarks, warm
from tests.benchmarks.effort import Effort
from tests.benchmarks.report import machine
from tests.benchmarks.rows import ROWS


def rows_of(text):
    names = list(ROWS) if text == "all" else text.split(",")
    if unknown := [name for name in names if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not a row; the rows are: all, {', '.join(ROWS)}")
    return names


def program(text):
    path = Path(text).absolute()
    if not (path.is_file() and os.access(path, os.X_OK)):
        raise argparse.ArgumentTypeError(f"{text} is not a program; name the `vodpoller` of another environment")
    return path


def effort_of(options, folder):
    effort = Effort(folder=folder)
    if options.full:
        effort = dataclasses.replace(effort, backlogs=(*effort.backlogs, 1_000_000))
    if options.quick:
        effort = Effort(
            folder=folder,
            secs=1,
            warm_secs=0.5,
            idle_secs=3,
            pulls=(1, 16),
            connections=(1, 8),
            backlogs=(1000,),
            stored_backlog=1000,
            stored_events=1000,
            starts=1,
        )
    if options.secs is not None:
        effort = dataclasses.replace(effort, secs=options.secs)
    return dataclasses.replace(effort, repeats=options.repeats, baseline=options.baseline)


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks",
        description=benchmarks.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=rows_of, default="all", help=f"all, or some of {', '.join(ROWS)}")
    parser.add_argument("--secs", type=float, help="length of each window of the steady state (10)")
    parser.add_argument("--repeats", type=int, default=1, help="runs of each comparison; the report has medians (1)")
    parser.add_argument(
        "--baseline",
        type=program,
        metavar="PROGRAM",
        help="the vodpoller of another version's environment: rows that compare consumers measure it too, alternating",
    )
    parser.add_argument("--quick", action="store_true", help="short windows and few values")
    parser.add_argument("--full", action="store_true", help="also a backlog of 1,000,000 events")
    parser.add_argument("--folder", type=Path, help="folder for the files (the system's folder for temporary files)")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vodpoller-benchmarks-", dir=options.folder) as folder:
        effort = effort_of(options, Path(folder))
        print(machine(effort.folder), flush=True)  # noqa: T201 - the result goes to stdout
        for name in options.rows:
            sys.stderr.write(f"{name} ({time.monotonic() - began:.0f} s so far)\n")
            for table in ROWS[name](effort):
                print(table.markdown(), flush=True)  # noqa: T201 - as above


if __name__ == "__main__":
    warm.NEVER_FORK.set()
    main()
