"""`vodpoller run` and `vodpoller once`: the daemon until it is told to stop, and until the queue is empty."""

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
    # The objects of the start stay; those of an event are freed by reference counting. There is little to collect.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    end(service.run())


@click.command()
@config_option
@click.option("--max-secs", type=click.FloatRange(1), default=600.0, show_default=True, help="End the pulling by then.")
@click.pass_obj
def once(signals: Signals, config_path: Path, max_secs: float) -> None:
    """Pull until the first empty answer, deliver what is due, and end: for cron.

    Exit code 0: nothing was left. 1: something is pending, or comes again, or VOD could not be reached or emptied.
    """
    daemon = open_daemon(load_config(config_path), signals=signals)
    end(0 if daemon.run_once(max_secs=max_secs) else EXIT_FAILURE)
