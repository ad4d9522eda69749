"""The configuration of a command: the option that names its file, and reading it."""

import os
from pathlib import Path
from typing import Final

import click

from vodpoller.cli.exits import EXIT_CONFIG
from vodpoller.cli.failure import fail
from vodpoller.config.load import load
from vodpoller.config.model import Config
from vodpoller.errors import ConfigError

DEFAULT_CONFIG: Final = Path("/etc/vodpoller/config.toml")

config_option = click.option(
    "-c",
    "--config",
    "config_path",
    # click must not check that the file is readable: an unreadable file ends with exit code 78, as every other problem.
    type=click.Path(path_type=Path, readable=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The configuration file.",
)


def load_config(path: Path, *, needs_key: bool = True, for_unit: bool = False) -> Config:
    """Read the configuration. If it has problems, print all of them and exit.

    Args:
        path: The file.
        needs_key: As for `load`.
        for_unit: As for `load`.
    """
    try:
        return load(path, env=os.environ, needs_key=needs_key, for_unit=for_unit)
    except ConfigError as error:
        fail(error.problems, EXIT_CONFIG)
