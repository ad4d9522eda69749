"""The program: a list of its commands, whose modules are imported when they run.

So `--version`, `--help` and completion are quick. The list says of a command the first sentence of its own help.
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
CATCHING: Final = ("run", "once")  # they handle signals themselves, from the first instant

COMMANDS: Final = (
    LazyCommand(
        "check",
        "vodpoller.cli.check:check",
        "Validate the configuration and say what it does.",
    ),
    LazyCommand(
        "deadletters",
        "vodpoller.cli.deadletters:deadletters",
        "Look at stored events, replay, move or purge them: dead letters, which wait for a person, or pending ones.",
    ),
    LazyCommand(
        "demo",
        "vodpoller.cli.demo:demo",
        "See it work: the whole daemon against the built-in simulator, in less than 10 seconds, without an account.",
    ),
    LazyCommand(
        "example",
        "vodpoller.cli.example:example",
        "Print an example file: a configuration, a unit, and what else runs or watches vodpoller.",
    ),
    LazyCommand(
        "once", "vodpoller.cli.run:once", "Pull until the first empty answer, deliver what is due, and end: for cron."
    ),
    LazyCommand(
        "reload",
        "vodpoller.cli.reload:reload",
        "Have the running daemon take its configuration anew, or say what is wrong with it.",
    ),
    LazyCommand(
        "route",
        "vodpoller.cli.route:route",
        "Say which routes take an event, which sinks get it, and why the other routes do not take it.",
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
        "Say whether events flow, and if not why: what the running daemon says, or the journal if none runs.",
    ),
)


class Program(LazyGroup):
    """All commands. Click handles a closed pipe; this handles the other outputs that cannot be written."""

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.filename is not None or error.errno not in UNWRITABLE:
                raise
            with suppress(OSError):
                click.echo(f"vodpoller: the output cannot be written: {error.strerror}", err=True)
            os._exit(EXIT_FAILURE)  # the interpreter's own end would try to write it once more

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command. Signals are let in before it is imported, which takes a while."""
        if not ctx.resilient_parsing:
            if args[0] in CATCHING:
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
    """Deliver the events of Tencent Cloud VOD's reliable callback, each of them, to where you want them."""
