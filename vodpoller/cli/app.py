"""The program: the list of its commands. The module of a command is imported only when the command runs.

So `--version`, `--help` and completion are fast. The list has the first sentence of the help of each command.
"""

import errno
import os
from contextlib import suppress
from typing import Any, Final

import click

from vodpoller import __version__
from vodpoller.cli.exits import EXIT_FAILURE
from vodpoller.cli.lazy import LazyCommand, LazyGroup
from vodpoller.process import Signals, let_signals_act

UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})
CATCH_SIGNALS: Final = ("run", "once")  # these commands handle signals themselves, from the start

COMMANDS: Final = (
    LazyCommand(
        "check",
        "vodpoller.cli.check:check",
        "Validate the configuration and print a summary of it.",
    ),
    LazyCommand(
        "deadletters",
        "vodpoller.cli.deadletters:deadletters",
        "List, show, export, replay or purge stored events: dead letters, which wait for a person, or pending ones.",
    ),
    LazyCommand(
        "demo",
        "vodpoller.cli.demo:demo",
        "See it work: the whole daemon against the built-in simulator, in less than 10 seconds, without an account.",
    ),
    LazyCommand(
        "example",
        "vodpoller.cli.example:example",
        "Print an example file: a configuration, a unit, and other files to run or monitor vodpoller.",
    ),
    LazyCommand(
        "once", "vodpoller.cli.run:once", "Pull until the first empty answer, deliver what is due, and exit: for cron."
    ),
    LazyCommand(
        "reload",
        "vodpoller.cli.reload:reload",
        "Make the running daemon read its configuration again, or print what is wrong with it.",
    ),
    LazyCommand(
        "route",
        "vodpoller.cli.route:route",
        "Print which routes take an event, which sinks get it, and why the other routes do not take it.",
    ),
    LazyCommand("run", "vodpoller.cli.run:run", "Run the daemon until SIGTERM or SIGINT; SIGHUP reloads."),
    LazyCommand("schema", "vodpoller.cli.schema:schema", "Print the JSON Schema of the configuration, for editors."),
    LazyCommand(
        "simulate",
        "vodpoller.cli.simulate:simulate",
        "Run the VOD event API on this machine: vodpoller and the official SDKs work against it.",
    ),
    LazyCommand(
        "status",
        "vodpoller.cli.status:status",
        "Print whether events flow and, if not, why: from the running daemon, or from the journal if no daemon runs.",
    ),
)


class Program(LazyGroup):
    """All commands. Click handles a closed pipe; this class handles all other outputs that cannot be written."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.filename is not None or error.errno not in UNWRITABLE:
                raise
            with suppress(OSError):
                click.echo(f"vodpoller: the output cannot be written: {error.strerror}", err=True)
            os._exit(EXIT_FAILURE)  # a normal exit would try to write the output again

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Signals take effect before it is imported, because the import takes time."""
        if not ctx.resilient_parsing:
            if args[0] in CATCH_SIGNALS:
                ctx.obj = Signals()
                ctx.obj.catch()
            else:
                let_signals_act()
        return super().resolve_command(ctx, args)


@click.group(
    cls=Program,
    commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="vodpoller")
def main() -> None:
    """Deliver every event of Tencent Cloud VOD's reliable callback to the sinks of your choice."""
