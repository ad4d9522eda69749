"""`vodpoller run` and `vodpoller once`: the daemon runs until it is stopped, or until the queue is empty."""

import faulthandler
import gc
from pathlib import Path
from typing import Final

import click

from vodpoller.cli.configuration import config_option, load_config
from vodpoller.cli.daemons import open_daemon, open_service
from vodpoller.cli.exits import EXIT_FAILURE, end
from vodpoller.process import Signals

GC_THRESHOLD: Final = 20_000


@click.command()
@config_option
@click.pass_obj
def run(signals: Signals, config_path: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reloads."""
    faulthandler.enable()
    service = open_service(config_path, signals)
    # The objects of the start are never freed, and those of an event are freed by reference counting: there is little
    # to collect.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    end(service.run())


@click.command()
@config_option
@click.option(
    "--max-secs", type=click.FloatRange(1), default=600.0, show_default=True, help="Maximum time to pull, in seconds."
)
@click.pass_obj
def once(signals: Signals, config_path: Path, max_secs: float) -> None:
    """Pull until the first empty answer, deliver what is due, and exit: for cron.

    Exit code 0: nothing is left. 1: an event is pending or will come again, or VOD could not be reached, or its queue
    was not empty at the end.
    """
    daemon = open_daemon(load_config(config_path), signals=signals)
    end(0 if daemon.run_once(max_secs=max_secs) else EXIT_FAILURE)
