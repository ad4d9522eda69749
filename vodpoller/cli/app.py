"""The commands and their exit codes. What a command needs is imported when it runs: `--version` stays quick."""

import errno
import faulthandler
import gc
import json
import os
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vodpoller import __version__
from vodpoller.process import Signals, let_signals_act

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console

    from vodpoller.config.model import Config
    from vodpoller.daemon import Daemon
    from vodpoller.journal.operator import Filter, Letters, StoredEvent
    from vodpoller.logs import Logger

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78
GC_THRESHOLD: Final = 20_000
SHOWN_CHARS: Final = 80
PIPED_WIDTH: Final = 200
STATUS_SECS: Final = 5.0  # the daemon looks into its journal before it answers
LETTER_ID: Final = click.IntRange(1, 2**63 - 1)
REASONS: Final = (  # of both states
    *("rejected", "gave_up", "malformed", "no_route"),
    *("sink_failed", "sink_down", "sink_paused", "queue_full", "out_of_time", "stopping", "journal_failed"),
    "sink_removed",
)
DEFAULT_CONFIG: Final = Path("/etc/vodpoller/config.toml")
UNWRITABLE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})
CATCHING: Final = ("run", "once")  # what a signal means to them is theirs to say, from the first instant


class _Program(click.Group):
    """All commands. Click knows of outputs that nobody reads any more; there are more that cannot be written."""

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


_config_option = click.option(
    "-c",
    "--config",
    "config_path",
    # Not click's own check of readability: a file that the user may not read is exit 78, as all that is wrong with it.
    type=click.Path(path_type=Path, readable=False),
    default=DEFAULT_CONFIG,
    show_default=True,
    help="The configuration file.",
)


@click.group(cls=_Program, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vodpoller")
@click.pass_context
def main(context: click.Context) -> None:
    """Deliver the events of Tencent Cloud VOD's reliable callback, each of them, to where you want them."""
    if context.invoked_subcommand not in CATCHING:
        let_signals_act()


@main.command()
@_config_option
def run(config_path: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reopens files and reads secrets again."""
    signals = Signals()
    signals.catch()
    faulthandler.enable()
    daemon = _open_daemon(_load(config_path), signals=signals, exit_code_if_stopped=0)
    # What is here by now stays; what an event leaves behind is freed by counting. So there is little to collect.
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    _end(daemon.run())


@main.command()
@_config_option
@click.option("--connect", is_flag=True, help="Also try key, clock and rights at VOD, every sink and the journal.")
@click.option("--strict", is_flag=True, help="Exit code 78 if there is a warning.")
def check(config_path: Path, *, connect: bool, strict: bool) -> None:
    """Validate the configuration and say what it does. Never consumes an event, writes nothing."""
    config = _load(config_path, for_unit=True)
    click.echo(f"{config_path}: good")
    warnings = config.all_warnings()
    for warning in warnings:
        click.echo(f"{config_path}: warning: {warning}", err=True)
    for source in config.sources:
        app = f"SubAppId {source.sub_app_id}" if source.sub_app_id else "the account's main application"
        rest = "every event has a route" if config.coverage[source.name] else f"other events: {source.unrouted}"
        click.echo(f"  source {source.name}: {app} at {config.api.endpoint}; {rest}")
    for route in config.routes:
        types = ", ".join(route.event_types) if route.event_types else "all events"
        condition = f" where {route.where}" if route.where else ""
        click.echo(f"  route {route.name}: {types}{condition} -> {', '.join(route.sinks)}")
    for name, sink in config.sinks.items():
        place = sink.place()
        click.echo(f"  sink {name}: {sink.type}{f', {place}' if place else ''}")
    origins = config.credentials.origins.items()
    click.echo(f"  key: {', '.join(f'{name} from {origin}' for name, origin in origins)}")
    works = not connect or _check_connections(config)
    if strict and warnings:
        sys.exit(EXIT_CONFIG)
    if not works:
        sys.exit(EXIT_FAILURE)


def _check_connections(config: "Config") -> bool:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring
    from rich.text import Text  # noqa: PLC0415 - see the module's docstring

    from vodpoller.checkup import check_connections  # noqa: PLC0415 - see the module's docstring
    from vodpoller.logs import printable  # noqa: PLC0415 - see the module's docstring

    table = Table("what", "", "found")
    good = True
    for finding in check_connections(config, _make_logger(config)):
        verdict = Text("good", style="green") if finding.good else Text("BAD", style="bold red")
        table.add_row(finding.what, verdict, printable(finding.text))
        good = good and finding.good
    _console().print(table)
    return good


@main.command()
@_config_option
@click.option("--max-secs", type=click.FloatRange(1), default=600.0, show_default=True, help="End the pulling by then.")
def once(config_path: Path, max_secs: float) -> None:
    """Pull until the first empty answer, deliver what is due, and end: for cron.

    Exit code 0: nothing was left. 1: something is pending, or comes again, or VOD could not be reached or emptied.
    """
    signals = Signals()
    signals.catch()
    daemon = _open_daemon(_load(config_path), signals=signals)
    _end(0 if daemon.run_once(max_secs=max_secs) else EXIT_FAILURE)


@main.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--strict", is_flag=True, help="Dead letters are a problem, too.")
def status(config_path: Path, *, as_json: bool, strict: bool) -> None:
    """Say whether events flow, and if not why: what the running daemon says, or the journal if none runs.

    Exit code 0: all is well. 1: no daemon runs, a source cannot be pulled, a sink is down, the journal cannot be
    written, or events are stored for a sink that the configuration no longer has.
    """
    config = _load(config_path, needs_key=False)
    report = _ask_status(config, strict=strict)
    if as_json:
        click.echo(json.dumps(report))
    else:
        _print_status(report)
    if report["problems"]:
        sys.exit(EXIT_FAILURE)


def _ask_status(config: "Config", *, strict: bool) -> "Mapping[str, Any]":
    from vodpoller.status_socket import ask, socket_path  # noqa: PLC0415 - see the module's docstring

    path = socket_path(config.journal.path)
    trouble = ""
    try:
        answer = ask(path, {"command": "status", "strict": strict}, timeout_secs=STATUS_SECS)
    except PermissionError:
        _fail([f"{path}: only root and the user that runs vodpoller may ask the daemon: try `sudo`"], EXIT_FAILURE)
    except (OSError, ValueError) as error:
        answer, trouble = None, str(error)
    if answer is not None:
        if "problems" in answer:
            return answer
        trouble = str(answer.get("error", "its answer is not a status"))
    return _status_of_journal(config, trouble, strict=strict)


def _status_of_journal(config: "Config", trouble: str, *, strict: bool) -> "Mapping[str, Any]":
    """What the journal knows.

    Args:
        config: Names the journal.
        trouble: What went wrong with a daemon that listens; empty if none does.
        strict: As for the daemon.
    """
    from vodpoller.status import SilentStatus, StoredStatus  # noqa: PLC0415 - see the module's docstring

    with _letters(config) as letters:
        is_in_use = letters.is_in_use()
        marks = letters.marks()
        stored = [StoredStatus(**asdict(found)) for found in letters.backlogs()]
    remedy = "`systemctl status vodpoller` and `journalctl -u vodpoller -e` say more"
    if trouble:
        cause = f"it runs, but gives no answer: {trouble}"
        remedy += "; if it hangs, or was updated since it started, restart it"
    elif is_in_use:
        cause = (
            "a process has the journal open, but gives no answer: the daemon is starting or stopping, or it is a"
            " `vodpoller once` or `replay`"
        )
    else:
        cause = "no daemon runs with this journal"
        remedy = f"`systemctl start vodpoller`; if it does not stay up, {remedy}"
    return SilentStatus(
        running=is_in_use,
        cause=cause,
        remedy=remedy,
        version=__version__,
        started_at=marks.get("started"),
        last_pull_at=marks.get("pull"),
        last_confirm_at=marks.get("confirm"),
        at=time.time(),
        sinks=list(config.sinks),
        stored=stored,
        path=str(config.journal.path),
        limit_bytes=config.journal.max_bytes,
    ).as_json(strict=strict)


def _print_status(report: "Mapping[str, Any]") -> None:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring
    from rich.text import Text  # noqa: PLC0415 - see the module's docstring

    from vodpoller.logs import printable  # noqa: PLC0415 - see the module's docstring

    console = _console()
    for problem in report["problems"]:
        what, cause, remedy = (printable(problem[name]) for name in ("what", "cause", "remedy"))
        console.print(Text.assemble(("PROBLEM", "bold red"), f" {what}: {cause}"), soft_wrap=True)
        console.print(f"  {remedy}", soft_wrap=True)
    if report["pid"] is not None:
        console.print(f"vodpoller {report['version']} runs since {report['started_at']}, process {report['pid']}")
        _print_parts(console, report)
    else:
        console.print(f"Last start: {report['started_at'] or 'never'}; last pull: {report['last_pull_at'] or 'never'}")
    if report["stored"]:
        table = Table("sink", "state", "events", "oldest since")
        for row in report["stored"]:
            table.add_row(printable(row["sink"]) or "(none)", row["state"], f"{row['events']:,}", row["oldest_at"])
        console.print(table)
    else:
        console.print("Nothing is stored: every event that was pulled has been delivered.")
    journal = report["journal"]
    taken = (
        "" if journal["stored_bytes"] is None else f"{journal['stored_bytes']:,} of {journal['limit_bytes']:,} bytes, "
    )
    console.print(
        f"journal {printable(journal['path'])}: {taken}last confirm {journal['last_confirm_at'] or 'never'}",
        soft_wrap=True,
    )


def _print_parts(console: "Console", report: "Mapping[str, Any]") -> None:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring

    from vodpoller.logs import printable  # noqa: PLC0415 - see the module's docstring

    sources = Table("source", "last pull", "error")
    for row in report["sources"]:
        said = printable(row["error"]) if row["error"] else ""
        next_pull = f" (next try {row['next_pull_at']})" if row["next_pull_at"] else ""
        sources.add_row(printable(row["name"]), row["last_pull_at"] or "never", said + next_pull)
    sinks = Table("sink", "state", "queued", "next try", "error")
    for row in report["sinks"]:
        if row["down_since"]:
            state = f"down since {row['down_since']}"
        else:
            state = f"paused until {row['paused_until']}" if row["paused_until"] else "accepts"
        queued, next_try = f"{row['queued']:,}", row["next_try_at"] or ""
        sinks.add_row(printable(row["name"]), state, queued, next_try, printable(row["error"]))
    for table in (sources, sinks):
        for column in table.columns:
            column.overflow = "fold"
        console.print(table)


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from vodpoller.config.schema import json_schema  # noqa: PLC0415 - see the module's docstring

    click.echo(json.dumps(json_schema(), indent=2))


@main.group()
def deadletters() -> None:
    """Look at stored events, replay, move or purge them: dead letters, which wait for a person, or pending ones."""


def _filter_options(command: "Callable[..., Any]") -> "Callable[..., Any]":
    for option in (
        click.option("--pending", is_flag=True, help="Those that will be tried again, instead of dead letters."),
        click.option("--task-id", help="The id of the task that the event tells of."),
        click.option("--file-id", help="The id of the video that the event is about."),
        click.option("--since", help="Stored since: a time (2026-11-23, 2026-11-23T08:00) or an age (90m, 12h, 3d)."),
        click.option(
            "--reason", type=click.Choice(REASONS), help="Why they are stored; those after no_route with --pending."
        ),
        click.option("--type", "event_type", help="The event type; * and ? are allowed."),
        click.option("--sink", help="The sink that lacks them."),
    ):
        command = option(command)
    return _config_option(command)


@deadletters.command("list")
@_filter_options
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Rows of the table.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, without a limit.")
def list_letters(config_path: Path, *, limit: int, as_json: bool, **options: Any) -> None:
    """List dead letters, the oldest first."""
    wanted = _filter(options)
    with _letters(_load(config_path, needs_key=False)) as letters:
        if as_json:
            for row in letters.stored(wanted):
                click.echo(json.dumps(_as_dict(row)))
            return
        _print_letters(list(letters.stored(wanted, limit=limit)), letters.count(wanted), pending=options["pending"])


def _print_letters(rows: "Sequence[StoredEvent]", total: int, *, pending: bool) -> None:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring

    from vodpoller.logs import printable  # noqa: PLC0415 - see the module's docstring

    console = _console()
    table = Table()
    folded = ("event type", "file id\ntask id", "error")
    since = "since\nnext try" if pending else "since"
    for name in ("id", since, "sink", "event type", "file id\ntask id", "reason", "tries", "error"):
        # On a narrow terminal these get more lines; nothing is cut off.
        table.add_column(name, no_wrap=name not in folded, overflow="fold")
    for row in rows:
        error = row.error if len(row.error) <= SHOWN_CHARS else row.error[: SHOWN_CHARS - 1] + "…"
        times = [row.stored_at] if row.due_at is None else [row.stored_at, row.due_at]
        table.add_row(
            str(row.id),
            "\n".join(map(_iso, times)),
            printable(row.sink) or "(none)",
            printable(row.event_type) or "(none)",
            "\n".join(printable(number) for number in (row.file_id, row.task_id) if number),
            printable(row.reason),
            str(row.attempts),
            printable(error),
        )
    if rows:
        console.print(table)
    console.print(f"{total:,} in all" + (f", {len(rows):,} shown (--limit)" if len(rows) < total else ""))


@deadletters.command()
@click.argument("letter_id", metavar="ID", type=LETTER_ID)
@_config_option
@click.option("--pending", is_flag=True, help="Only if it is one that will be tried again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, the body in it as a string.")
def show(letter_id: int, config_path: Path, *, pending: bool, as_json: bool) -> None:
    """Show one stored event whole, with its body. What a terminal would not print is written as JSON escapes."""
    from vodpoller.journal.operator import Filter  # noqa: PLC0415 - see the module's docstring
    from vodpoller.logs import printable  # noqa: PLC0415 - see the module's docstring

    with _letters(_load(config_path, needs_key=False)) as letters:
        wanted = [Filter(ids=[letter_id], state=state) for state in ("pending", "dead")[: 1 if pending else 2]]
        found = next((pair for which in wanted for pair in letters.with_bodies(which)), None)
    if found is None:
        what = "pending event" if pending else "stored event"
        _fail([f"there is no {what} {letter_id} (see `vodpoller deadletters list`)"], EXIT_FAILURE)
    row, body = found
    text = body.decode(errors="replace")
    if as_json:
        click.echo(json.dumps({**_as_dict(row), "body": text}))
        return
    for name, value in _as_dict(row).items():
        click.echo(f"{name + ':':12} {'' if value is None else printable(str(value))}")
    click.echo()
    for line in text.split("\n"):
        click.echo(printable(line))


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@_filter_options
def export(letter_ids: tuple[int, ...], config_path: Path, **options: Any) -> None:
    """Print dead letters with their bodies, one JSON object a line: those named, those that the options mean, or all.

    A body that is JSON is the member `body` as it is, with every digit; one that is not is in base64 as `body_base64`.
    """
    from base64 import b64encode  # noqa: PLC0415 - see the module's docstring

    from vodpoller.journal.operator import as_json_value  # noqa: PLC0415 - see the module's docstring

    with _letters(_load(config_path, needs_key=False)) as letters:
        for row, body in letters.with_bodies(_filter(options, ids=letter_ids)):
            known = json.dumps(_as_dict(row))[:-1]
            value = as_json_value(body)
            member = f'"body_base64": "{b64encode(body).decode()}"' if value is None else f'"body": {value}'
            click.echo(f"{known}, {member}}}")
        missing = _say_missing(letters, letter_ids, pending=options["pending"])
    if missing:
        sys.exit(EXIT_FAILURE)


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@_filter_options
@click.option("--to", "target", metavar="SINK", help="Give them to this sink instead of their own.")
def replay(letter_ids: tuple[int, ...], config_path: Path, *, target: str | None, **options: Any) -> None:
    """Deliver dead letters after all: those named, those that the options mean, or all. With --pending: try them now.

    A running daemon delivers them within seconds. Without one this command does, together with all else that is due;
    what fails stays pending, and what is rejected is a dead letter again, each with its new error. Interrupted, it can
    be called again. Exit code 1: something could not be delivered.

    With --to, an event that is on its way to its own sink at this moment may reach both.
    """
    from vodpoller.journal.operator import Filter  # noqa: PLC0415 - see the module's docstring
    from vodpoller.router import Router  # noqa: PLC0415 - see the module's docstring

    config = _load(config_path, needs_key=False)
    if target is not None and target not in config.sinks:
        there_are = ", ".join(config.sinks)
        raise click.BadParameter(
            f"no sink of the configuration is {target!r} (there are: {there_are})", param_hint="--to"
        )
    wanted = _filter(options, ids=letter_ids)
    marked = impossible = 0
    with _letters(config, writable=True) as letters:
        # An id that is pending by now was replayed by a call that was interrupted.
        missing = _say_missing(letters, letter_ids, pending=options["pending"], also_pending=True)
        portions = letters.replay(wanted, router=Router(config.routes), sinks=list(config.sinks), to=target)
        for done, undone in portions:
            marked, impossible = marked + done, impossible + undone
        running = letters.is_in_use()
        pending, dead = letters.count(Filter(state="pending")), letters.count(Filter())
    click.echo(f"{marked:,} to be delivered again")
    if impossible:
        why = "unreadable" if target else "unreadable, without a route, or of a sink that is no more"
        click.echo(f"{impossible:,} cannot be: {why}" + ("" if target else " (see --to)"), err=True)
    all_done = not (missing or impossible)
    if running and marked:
        click.echo("The running daemon delivers them; `vodpoller status` tells what is left.")
    elif pending and not running:
        all_done = _deliver_here(config, pending=pending, dead=dead) and all_done
    _end(0 if all_done else EXIT_FAILURE)


def _deliver_here(config: "Config", *, pending: int, dead: int) -> bool:
    """Deliver what is due, without a daemon; whether nothing is left of it."""
    from rich.progress import Progress  # noqa: PLC0415 - see the module's docstring

    from vodpoller.journal.operator import Filter  # noqa: PLC0415 - see the module's docstring

    daemon = _open_daemon(config, quiet=True)
    with Progress(console=_console(stderr=True)) as progress:
        task = progress.add_task("delivering", total=pending)
        all_done = daemon.run_once(progress=lambda delivered: progress.update(task, completed=delivered))
    with _letters(config) as letters:
        rejected = letters.count(Filter()) - dead
    click.echo(f"{daemon.redelivered_events:,} delivered")
    if rejected > 0:
        click.echo(f"{rejected:,} are dead letters again: see `vodpoller deadletters list`.", err=True)
    if not all_done:
        click.echo("Some are still pending: see `vodpoller deadletters list --pending`.", err=True)
    return all_done and rejected <= 0


def _say_missing(letters: "Letters", ids: "Sequence[int]", *, pending: bool, also_pending: bool = False) -> bool:
    """Say which of the ids that were asked for are not of the state that was asked for; whether there are such."""
    from vodpoller.journal.operator import Filter  # noqa: PLC0415 - see the module's docstring

    if not ids:
        return False
    there = {state: {row.id for row in letters.stored(Filter(state=state, ids=ids))} for state in ("dead", "pending")}
    found = there["pending"] if pending else there["dead"] | (there["pending"] if also_pending else set())
    missing = [number for number in ids if number not in found]
    for number in missing:
        if number in there["dead"]:
            why = f"{number} is a dead letter and not pending (leave --pending out)"
        elif number in there["pending"]:
            why = f"{number} is pending and no dead letter (add --pending)"
        else:
            why = f"there is no {'pending event' if pending else 'dead letter'} {number}"
            why += " (see `vodpoller deadletters list`)"
        click.echo(f"vodpoller: {why}", err=True)
    return bool(missing)


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@_filter_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(letter_ids: tuple[int, ...], config_path: Path, *, yes: bool, **options: Any) -> None:
    """Delete dead letters for good: those named, those that the options mean, or all.

    With --pending, an event that is on its way to its sink at this moment may still reach it.
    """
    wanted = _filter(options, ids=letter_ids)
    with _letters(_load(config_path, needs_key=False), writable=True) as letters:
        missing = _say_missing(letters, letter_ids, pending=options["pending"])
        wanted = replace(wanted, last_id=letters.last_id())  # not what comes while the question waits for its answer
        number = letters.count(wanted)
        if number and not yes:
            what = "pending events" if options["pending"] else "dead letters"
            click.confirm(f"Delete {number:,} {what} for good?", abort=True)
        deleted = sum(letters.purge(wanted))
    click.echo(f"{deleted:,} deleted")
    if missing:
        sys.exit(EXIT_FAILURE)


@main.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where its files go.  [default: a new folder]")
def demo(folder: Path | None) -> None:
    """See it work: the whole daemon against the built-in simulator, in less than 10 seconds, without an account."""
    from vodpoller.demo import run_demo  # noqa: PLC0415 - see the module's docstring

    sys.exit(run_demo(folder))


@main.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=0, show_default=True, help="The port to listen on; 0 takes a free one.")
@click.option("--events", default=0, show_default=True, help="Generated events in the queue at the start.")
@click.option("--rate", default=0.0, show_default=True, help="Events per second that are born while it runs.")
@click.option("--feed", default=0, show_default=True, help="How many --rate brings in all; 0 for no end.")
@click.option(
    "--events-file", type=click.Path(path_type=Path), help="Bodies to serve, one a line, passed on as they are."
)
@click.option("--poll-secs", default=5.0, show_default=True, help="How long a pull of an empty queue hangs.")
@click.option("--visibility-secs", default=30.0, show_default=True, help="The lease of a pulled event.")
@click.option("--batch", default=16, show_default=True, help="Events a pull brings at most.")
@click.option("--requests-per-sec", default=100.0, show_default=True, help="The quota of each action; 0 for none.")
@click.option("--confirms-per-sec", type=float, help="The quota of confirms.  [default: as --requests-per-sec]")
@click.option("--rtt-secs", default=0.0, show_default=True, help="The round trip of each request.")
@click.option(
    "--empty",
    type=click.Choice(["null", "error", "list", "absent", "mixed"]),
    default="null",
    show_default=True,
    help="How an empty queue answers.",
)
@click.option(
    "--stale",
    type=click.Choice(["atomic", "per_handle"]),
    default="atomic",
    show_default=True,
    help="What a stale or refused handle does to the others of its confirm.",
)
@click.option("--sub-app-id", type=int, help="The only SubAppId that exists.  [default: any]")
@click.option(
    "--deny",
    metavar="ACTION",
    multiple=True,
    help="The key has no right to PullEvents or ConfirmEvents: UnauthorizedOperation. May be repeated.",
)
@click.option("--secret-id", help="Verify signatures: the SecretId.  [default: verify nothing]")
@click.option("--secret-key", help="The SecretKey that belongs to it.")
@click.option("--token", help="The temporary token that requests must carry.")
@click.option(
    "--faults",
    default="",
    help="Probabilities, as in reset=0.02,confirm.lost=0.1: reset, http_5xx, internal_error and limit keep a request"
    " from being carried out; truncated, slow and lost spoil the answer. Also as pull.NAME and confirm.NAME.",
)
@click.option("--slow-secs", default=3.0, show_default=True, help="What the fault `slow` adds.")
@click.option(
    "--forget-confirms",
    default=0,
    show_default=True,
    help="The number of handles (the first to be confirmed) that are refused until their lease ends: they come again.",
)
@click.option("--clock-skew-secs", default=0.0, show_default=True, help="How far its clock is ahead.")
@click.option("--keep-bodies", is_flag=True, help="Keep the bodies of confirmed events for /_ledger?bodies=1.")
@click.option("--seed", type=int, help="Of everything random.")
def simulate(**options: Any) -> None:
    """Run the VOD event API on this machine: vodpoller and the official SDKs work against it.

    Prints its URL. GET /_stats and /_ledger tell what happened; POST /_feed takes bodies, /_control changes options.
    """
    from vodpoller.simulator.options import SimulatorOptions, parse_faults  # noqa: PLC0415 - see the module's docstring
    from vodpoller.simulator.service import serve  # noqa: PLC0415 - see the module's docstring

    try:
        options["faults"] = parse_faults(options["faults"])
        wanted = SimulatorOptions(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        serve(wanted, None, click.echo, lambda message: click.echo(f"vodpoller: {message}", err=True))
    except OSError as error:
        _fail([f"the simulator cannot start: {error}"], EXIT_FAILURE)


def _load(path: Path, *, needs_key: bool = True, for_unit: bool = False) -> "Config":
    """The configuration, or the end of the process with everything that is wrong with it."""
    from vodpoller.config.load import load  # noqa: PLC0415 - see the module's docstring
    from vodpoller.errors import ConfigError  # noqa: PLC0415 - see the module's docstring

    try:
        return load(path, env=os.environ, needs_key=needs_key, for_unit=for_unit)
    except ConfigError as error:
        _fail(error.problems, EXIT_CONFIG)


def _open_daemon(
    config: "Config", *, signals: Signals | None = None, exit_code_if_stopped: int = EXIT_FAILURE, quiet: bool = False
) -> "Daemon":
    """The daemon, open; or the end of the process: with a sentence, or because a signal asked for it meanwhile."""
    from vodpoller.daemon import Daemon  # noqa: PLC0415 - see the module's docstring
    from vodpoller.errors import (  # noqa: PLC0415 - see the module's docstring
        ConfigError,
        JournalError,
        StoppingError,
        StorageError,
        UnusableJournalError,
    )
    from vodpoller.systemd import Notifier  # noqa: PLC0415 - see the module's docstring

    try:
        log = _make_logger(config, quiet=quiet)
        return Daemon(config, log=log, notifier=Notifier.of(os.environ), signals=signals)
    except StoppingError:
        _end(exit_code_if_stopped)
    except ConfigError as error:
        _fail(error.problems, EXIT_CONFIG)
    except UnusableJournalError as error:
        _fail([str(error)], EXIT_CONFIG)
    except (JournalError, StorageError) as error:
        _fail([str(error)], EXIT_FAILURE)
    finally:
        _give_to_owner(config)


def _give_to_owner(config: "Config") -> None:
    """Give what root's commands create to the owner of the folder it is in: the daemon runs as another user."""
    if os.geteuid() != 0:
        return
    claimed = {claim.partition(":")[2] for sink in config.sinks.values() for claim in sink.claims()}
    for name in [str(config.journal.path), *claimed]:
        for path in (Path(f"{name}{ending}") for ending in ("", ".lock", "-wal", "-shm", ".v1")):
            with suppress(OSError):
                folder, file = path.parent.stat(), path.lstat()
                if file.st_uid == 0 and folder.st_uid != 0:
                    os.chown(path, folder.st_uid, folder.st_gid, follow_symlinks=False)


def _end(code: int) -> NoReturn:
    """Exit; a thread that hangs in a sink must not hold the exit, as the interpreter's own end would let it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _letters(config: "Config", *, writable: bool = False) -> "Iterator[Letters]":
    from vodpoller.errors import JournalError, UnusableJournalError  # noqa: PLC0415 - see the module's docstring
    from vodpoller.journal.operator import Letters  # noqa: PLC0415 - see the module's docstring

    try:
        with Letters(config.journal.path, writable=writable) as letters:
            yield letters
    except UnusableJournalError as error:
        _fail([str(error)], EXIT_CONFIG)
    except JournalError as error:
        _fail([str(error)], EXIT_FAILURE)


def _filter(options: "Mapping[str, Any]", *, ids: "Sequence[int]" = ()) -> "Filter":
    from vodpoller.journal.operator import REASONS, Filter  # noqa: PLC0415 - see the module's docstring

    state, reason = "pending" if options["pending"] else "dead", options["reason"]
    if reason is not None and reason not in REASONS[state]:
        what, other = (
            ("pending events", "leave --pending out") if options["pending"] else ("dead letters", "add --pending")
        )
        raise click.BadParameter(
            f"{what} never have the reason {reason!r} but {', '.join(REASONS[state])} ({other})", param_hint="--reason"
        )
    since = _time(options["since"]) if options["since"] else None
    named = {name: options[name] for name in ("sink", "event_type", "reason", "file_id", "task_id")}
    return Filter(state=state, ids=ids, since=since, **named)


def _time(text: str) -> float:
    """A time or an age, in seconds since 1970."""
    units = {"m": 60, "h": 3600, "d": 86_400}
    try:
        if text[:-1].isdecimal() and text[-1] in units:
            return time.time() - int(text[:-1]) * units[text[-1]]
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError) as error:
        problem = f"{text!r} is neither a time (2026-11-23T08:00) nor an age (90m, 12h, 3d)"
        raise click.BadParameter(problem, param_hint="--since") from error


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _as_dict(row: "StoredEvent") -> dict[str, Any]:
    due_at = None if row.due_at is None else _iso(row.due_at)
    return {**asdict(row), "stored_at": _iso(row.stored_at), "due_at": due_at}


def _console(*, stderr: bool = False) -> "Console":
    from rich.console import Console  # noqa: PLC0415 - see the module's docstring

    # Tables that a pipe or a file gets are as wide as they need to be.
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else PIPED_WIDTH, markup=False, highlight=False)


def _make_logger(config: "Config", *, quiet: bool = False) -> "Logger":
    """The log; a quiet one leaves out the line for each event, where a bar shows the progress."""
    from vodpoller.logs import make_logger  # noqa: PLC0415 - see the module's docstring

    return make_logger(
        sys.stderr,
        level="warning" if quiet and config.log.level == "info" else config.log.level,
        log_format=config.log.format,
        secrets=lambda: [secret.get() for secret in config.secrets()],
        journald_stream=os.environ.get("JOURNAL_STREAM", ""),
    )


def _fail(problems: Any, code: int) -> NoReturn:
    from vodpoller.logs import is_journald, printable  # noqa: PLC0415 - see the module's docstring

    priority = "<3>" if is_journald(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    for problem in problems:
        click.echo(f"{priority}vodpoller: {printable(problem)}", err=True)
    sys.exit(code)
