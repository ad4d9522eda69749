"""`vodpoller demo`."""

import sys
from pathlib import Path

import click

from vodpoller.demo import run_demo


@click.command()
@click.option(
    "--dir", "folder", type=click.Path(path_type=Path), help="The folder for its files.  [default: a new folder]"
)
def demo(folder: Path | None) -> None:
    """See it work: the whole daemon against the built-in simulator, in less than 10 seconds, without an account."""
    sys.exit(run_demo(folder))
