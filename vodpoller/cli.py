"""The commands and their exit codes. What a command needs is imported when it runs: `--version` stays quick."""

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

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from rich.console import Console

    from vodpoller.config import Config
    from vodpoller.daemon import Daemon
    from vodpoller.letters import Filter, Letters, StoredEvent
    from vodpoller.logs import Logger

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78
GC_THRESHOLD: Final = 20_000
SHOWN_CHARS: Final = 80
PIPED_WIDTH: Final = 200
LETTER_ID: Final = click.IntRange(1, 2**63 - 1)
REASONS: Final = ("rejected", "gave_up", "malformed", "unrouted", "errored", "unsettled")
DEFAULT_CONFIG: Final = Path("/etc/vodpoller/config.toml")

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


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="vodpoller")
def main() -> None:
    """Deliver the events of Tencent Cloud VOD's reliable callback, each of them, to where you want them."""


@main.command()
@_config_option
def run(config_path: Path) -> None:
    """Run the daemon until SIGTERM or SIGINT; SIGHUP reopens files and reads secrets again."""
    faulthandler.enable()
    daemon = _open_daemon(_load(config_path))
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
    for warning in config.warnings:
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
    if strict and config.warnings:
        sys.exit(EXIT_CONFIG)
    if not works:
        sys.exit(EXIT_FAILURE)


def _check_connections(config: "Config") -> bool:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring
    from rich.text import Text  # noqa: PLC0415 - see the module's docstring

    from vodpoller.checkup import check_connections  # noqa: PLC0415 - see the module's docstring

    table = Table("what", "", "found")
    good = True
    for finding in check_connections(config, _make_logger(config)):
        verdict = Text("good", style="green") if finding.good else Text("BAD", style="bold red")
        table.add_row(finding.what, verdict, finding.text)
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
    daemon = _open_daemon(_load(config_path))
    _end(0 if daemon.run_once(max_secs=max_secs) else EXIT_FAILURE)


@main.command()
@_config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def status(config_path: Path, *, as_json: bool) -> None:
    """Say what the journal knows: what is stored by sink and age, when VOD last answered."""
    with _letters(_load(config_path, needs_key=False)) as letters:
        report = {
            "running": letters.is_in_use(),
            **{f"last_{name}_at": _iso(at) for name, at in sorted(letters.marks().items())},
            "stored": [
                {"sink": found.sink, "state": found.state, "events": found.events, "oldest_at": _iso(found.oldest_at)}
                for found in letters.backlogs()
            ],
        }
    if as_json:
        click.echo(json.dumps(report))
        return
    _print_status(report)


def _print_status(report: "Mapping[str, Any]") -> None:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring

    console = _console()
    console.print("The daemon runs." if report["running"] else "No daemon runs with this journal.")
    for name in ("started", "pull", "confirm"):
        console.print(f"Last {name}: {report.get(f'last_{name}_at', 'never')}")
    if not report["stored"]:
        console.print("Nothing is stored: every event that was pulled has been delivered.")
        return
    table = Table("sink", "state", "events", "oldest since")
    for row in report["stored"]:
        table.add_row(row["sink"] or "(none)", row["state"], f"{row['events']:,}", row["oldest_at"])
    console.print(table)


@main.command()
def schema() -> None:
    """Print the JSON Schema of the configuration, for editors."""
    from vodpoller.config import json_schema  # noqa: PLC0415 - see the module's docstring

    click.echo(json.dumps(json_schema(), indent=2))


@main.group()
def deadletters() -> None:
    """Look at dead letters: events that wait for a person. Replay or purge them."""


def _filter_options(command: "Callable[..., Any]") -> "Callable[..., Any]":
    for option in (
        click.option("--since", help="Stored since: a time (2026-11-23, 2026-11-23T08:00) or an age (90m, 12h, 3d)."),
        click.option("--reason", type=click.Choice(REASONS), help="Why they are stored; the last two are --pending."),
        click.option("--type", "event_type", help="The event type; * and ? are allowed."),
        click.option("--sink", help="The sink that lacks them."),
    ):
        command = option(command)
    return _config_option(command)


@deadletters.command("list")
@_filter_options
@click.option("--pending", is_flag=True, help="What will be tried again, instead of dead letters.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="Rows of the table.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line, without a limit.")
def list_letters(config_path: Path, *, pending: bool, limit: int, as_json: bool, **options: Any) -> None:
    """List dead letters, the oldest first."""
    wanted = _filter(options, state="pending" if pending else "dead")
    with _letters(_load(config_path, needs_key=False)) as letters:
        if as_json:
            for row in letters.stored(wanted):
                click.echo(json.dumps(_as_dict(row)))
            return
        _print_letters(list(letters.stored(wanted, limit=limit)), letters.count(wanted))


def _print_letters(rows: "Sequence[StoredEvent]", total: int) -> None:
    from rich.table import Table  # noqa: PLC0415 - see the module's docstring

    console = _console()
    table = Table()
    for name in ("id", "since", "sink", "event type", "reason", "tries", "error"):
        # On a narrow terminal these two get more lines; nothing is cut off.
        table.add_column(name, no_wrap=name not in ("event type", "error"), overflow="fold")
    for row in rows:
        error = row.error if len(row.error) <= SHOWN_CHARS else row.error[: SHOWN_CHARS - 1] + "…"
        cells = (str(row.id), _iso(row.stored_at), row.sink or "(none)", row.event_type or "(none)", row.reason)
        table.add_row(*cells, str(row.attempts), error)
    if rows:
        console.print(table)
    console.print(f"{total:,} in all" + (f", {len(rows):,} shown (--limit)" if len(rows) < total else ""))


@deadletters.command()
@click.argument("letter_id", metavar="ID", type=LETTER_ID)
@_config_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object, the body in it as a string.")
def show(letter_id: int, config_path: Path, *, as_json: bool) -> None:
    """Show one stored event whole, with its body."""
    from vodpoller.letters import Filter  # noqa: PLC0415 - see the module's docstring

    with _letters(_load(config_path, needs_key=False)) as letters:
        wanted = [Filter(ids=[letter_id], state=state) for state in ("dead", "pending")]
        row = next((row for which in wanted for row in letters.stored(which)), None)
        body = letters.body(letter_id)
    if row is None or body is None:
        _fail([f"there is no stored event {letter_id} (see `vodpoller deadletters list`)"], EXIT_FAILURE)
    text = body.decode(errors="replace")
    if as_json:
        click.echo(json.dumps({**_as_dict(row), "body": text}))
        return
    for name, value in _as_dict(row).items():
        click.echo(f"{name + ':':12} {value}")
    click.echo()
    click.echo(text)


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@_filter_options
def replay(letter_ids: tuple[int, ...], config_path: Path, **options: Any) -> None:
    """Deliver dead letters after all: those named, those that the options mean, or all.

    A running daemon delivers them within seconds. Without one this command does, together with all else that is due;
    what fails stays pending, and what is rejected is a dead letter again, each with its new error. Interrupted, it can
    be called again. Exit code 1: something could not be delivered.
    """
    from vodpoller.letters import Filter  # noqa: PLC0415 - see the module's docstring
    from vodpoller.router import Router  # noqa: PLC0415 - see the module's docstring

    config = _load(config_path, needs_key=False)
    wanted = _filter(options, ids=letter_ids)
    marked = impossible = 0
    with _letters(config, writable=True) as letters:
        missing = _say_missing(letters, letter_ids, states=("dead", "pending"))
        for done, undone in letters.replay(wanted, router=Router(config.routes), sinks=list(config.sinks)):
            marked, impossible = marked + done, impossible + undone
        running = letters.is_in_use()
        pending, dead = letters.count(Filter(state="pending")), letters.count(Filter())
    click.echo(f"{marked:,} to be delivered again")
    if impossible:
        click.echo(f"{impossible:,} cannot be: unreadable, without a route, or of a sink that is no more", err=True)
    all_done = not (missing or impossible)
    if running and marked:
        click.echo("The running daemon delivers them; `vodpoller status` tells what is left.")
    elif pending and not running:
        all_done = _deliver_here(config, pending=pending, dead=dead) and all_done
    _end(0 if all_done else EXIT_FAILURE)


def _deliver_here(config: "Config", *, pending: int, dead: int) -> bool:
    """Deliver what is due, without a daemon; whether nothing is left of it."""
    from rich.progress import Progress  # noqa: PLC0415 - see the module's docstring

    from vodpoller.letters import Filter  # noqa: PLC0415 - see the module's docstring

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


def _say_missing(letters: "Letters", ids: "Sequence[int]", *, states: "Sequence[str]") -> bool:
    """Say which of the ids that were asked for are none; whether there are such."""
    from vodpoller.letters import Filter  # noqa: PLC0415 - see the module's docstring

    found = {row.id for state in states for row in letters.stored(Filter(state=state, ids=ids))} if ids else set()
    missing = [number for number in ids if number not in found]
    for number in missing:
        click.echo(f"vodpoller: there is no dead letter {number} (see `vodpoller deadletters list`)", err=True)
    return bool(missing)


@deadletters.command()
@click.argument("letter_ids", metavar="[ID]...", nargs=-1, type=LETTER_ID)
@_filter_options
@click.option("--yes", is_flag=True, help="Do not ask.")
def purge(letter_ids: tuple[int, ...], config_path: Path, *, yes: bool, **options: Any) -> None:
    """Delete dead letters for good: those named, those that the options mean, or all."""
    wanted = _filter(options, ids=letter_ids)
    with _letters(_load(config_path, needs_key=False), writable=True) as letters:
        missing = _say_missing(letters, letter_ids, states=["dead"])
        wanted = replace(wanted, last_id=letters.last_id())  # not what comes while the question waits for its answer
        number = letters.count(wanted)
        if number and not yes:
            click.confirm(f"Delete {number:,} dead letters for good?", abort=True)
        deleted = sum(letters.purge(wanted))
    click.echo(f"{deleted:,} deleted")
    if missing:
        sys.exit(EXIT_FAILURE)


@main.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where its files go.  [default: a new folder]")
def demo(folder: Path | None) -> None:
    """See it work: the whole daemon against the built-in simulator, in 10 seconds, without an account."""
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
    help="What a stale handle does to the others of its confirm.",
)
@click.option("--sub-app-id", type=int, help="The only SubAppId that exists.  [default: any]")
@click.option("--secret-id", help="Verify signatures: the SecretId.  [default: verify nothing]")
@click.option("--secret-key", help="The SecretKey that belongs to it.")
@click.option("--token", help="The temporary token that requests must carry.")
@click.option("--faults", default="", help="Probabilities, as in reset=0.02,confirm.lost=0.1; see the README.")
@click.option("--slow-secs", default=3.0, show_default=True, help="What the fault `slow` adds.")
@click.option("--forget-confirms", default=0, show_default=True, help="So many confirms succeed without effect.")
@click.option("--clock-skew-secs", default=0.0, show_default=True, help="How far its clock is ahead.")
@click.option("--keep-bodies", is_flag=True, help="Keep the bodies of confirmed events for /_ledger?bodies=1.")
@click.option("--seed", type=int, help="Of everything random.")
def simulate(**options: Any) -> None:
    """Run the VOD event API on this machine: vodpoller and the official SDKs work against it.

    Prints its URL. GET /_stats and /_ledger tell what happened; POST /_feed takes bodies, /_control changes options.
    """
    from vodpoller.simulator import SimulatorOptions, parse_faults, serve  # noqa: PLC0415 - see the module's docstring

    try:
        options["faults"] = parse_faults(options["faults"])
        wanted = SimulatorOptions(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        serve(wanted, None, click.echo)
    except OSError as error:
        _fail([f"the simulator cannot start: {error}"], EXIT_FAILURE)


def _load(path: Path, *, needs_key: bool = True, for_unit: bool = False) -> "Config":
    """The configuration, or the end of the process with everything that is wrong with it."""
    from vodpoller.config import load  # noqa: PLC0415 - see the module's docstring
    from vodpoller.errors import ConfigError  # noqa: PLC0415 - see the module's docstring

    try:
        return load(path, env=os.environ, needs_key=needs_key, for_unit=for_unit)
    except ConfigError as error:
        _fail(error.problems, EXIT_CONFIG)


def _open_daemon(config: "Config", *, quiet: bool = False) -> "Daemon":
    from vodpoller.daemon import Daemon  # noqa: PLC0415 - see the module's docstring
    from vodpoller.errors import (  # noqa: PLC0415 - see the module's docstring
        ConfigError,
        JournalError,
        StorageError,
        UnusableJournalError,
    )
    from vodpoller.systemd import Notifier  # noqa: PLC0415 - see the module's docstring

    try:
        log = _make_logger(config, quiet=quiet)
        return Daemon(config, log=log, notifier=Notifier(os.environ.get("NOTIFY_SOCKET", "")))
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
    from vodpoller.letters import Letters  # noqa: PLC0415 - see the module's docstring

    try:
        with Letters(config.journal.path, writable=writable) as letters:
            yield letters
    except UnusableJournalError as error:
        _fail([str(error)], EXIT_CONFIG)
    except JournalError as error:
        _fail([str(error)], EXIT_FAILURE)


def _filter(options: "Mapping[str, Any]", *, state: str = "dead", ids: "Sequence[int]" = ()) -> "Filter":
    from vodpoller.letters import Filter  # noqa: PLC0415 - see the module's docstring

    since = _time(options["since"]) if options["since"] else None
    named = {name: options[name] for name in ("sink", "event_type", "reason")}
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
    return {**asdict(row), "stored_at": _iso(row.stored_at)}


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
        journal_stream=os.environ.get("JOURNAL_STREAM", ""),
    )


def _fail(problems: Any, code: int) -> NoReturn:
    from vodpoller.logs import is_journal  # noqa: PLC0415 - see the module's docstring

    priority = "<3>" if is_journal(sys.stderr, os.environ.get("JOURNAL_STREAM", "")) else ""
    for problem in problems:
        click.echo(f"{priority}vodpoller: {problem}", err=True)
    sys.exit(code)
