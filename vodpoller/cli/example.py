"""`vodpoller example`."""

import sys

import click

from vodpoller.examples import EXAMPLES

_WIDTH = max(map(len, EXAMPLES)) + 2
# \b keeps click from joining the lines.
_LIST = "\b\n" + "\n".join(f"{name:{_WIDTH}}{example.about}" for name, example in EXAMPLES.items())


@click.command(epilog=_LIST)
@click.argument("name", type=click.Choice(list(EXAMPLES)))
def example(name: str) -> None:
    """Print an example file: a configuration, a unit, and other files to run or monitor vodpoller.

    For instance: vodpoller example config > config.toml
    """
    sys.stdout.flush()
    sys.stdout.buffer.write(EXAMPLES[name].read())
    sys.stdout.buffer.flush()
