"""The commands and their exit codes. What a command needs is imported when it runs: `--version` stays quick."""

import faulthandler
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from vodpoller import __version__

if TYPE_CHECKING:
    from vodpoller.config import Config
    from vodpoller.logs import Logger

EXIT_FAILURE: Final = 1
EXIT_CONFIG: Final = 78
DEFAULT_CONFIG: Final = Path("/etc/vodpoller/config.toml")

_config_option = click.option(
    "-c",
    "--config",
    "config_path",
    type=click.Path(path_type=Path),
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
    config = _load(config_path)
    from vodpoller.daemon import Daemon  # noqa: PLC0415 - see the module's docstring
    from vodpoller.systemd import Notifier  # noqa: PLC0415 - see the module's docstring

    log = _make_logger(config)
    daemon = _opened(lambda: Daemon(config, log=log, notifier=Notifier(os.environ.get("NOTIFY_SOCKET", ""))))
    code = daemon.run()
    # A thread that hangs in a sink must not hold the exit, as the interpreter's own end would let it.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@main.command()
@_config_option
def check(config_path: Path) -> None:
    """Validate the configuration and say what it does; opens nothing, connects to nothing."""
    config = _load(config_path)
    click.echo(f"{config_path}: good")
    for source in config.sources:
        app = f"SubAppId {source.sub_app_id}" if source.sub_app_id else "the account's main application"
        rest = "every event has a route" if config.coverage[source.name] else f"other events: {source.unrouted}"
        click.echo(f"  source {source.name}: {app} at {config.api.endpoint}; {rest}")
    for route in config.routes:
        types = ", ".join(route.event_types) if route.event_types else "all events"
        condition = f" where {route.where}" if route.where else ""
        click.echo(f"  route {route.name}: {types}{condition} -> {', '.join(route.sinks)}")
    for name, sink in config.sinks.items():
        click.echo(f"  sink {name}: {sink.type}")


@main.command()
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where its files go.  [default: a new folder]")
def demo(folder: Path | None) -> None:
    """See it work: the whole daemon against the built-in simulator, in 15 seconds, without an account."""
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


def _load(path: Path) -> "Config":
    """The configuration, or the end of the process with everything that is wrong with it."""
    from vodpoller.config import load  # noqa: PLC0415 - see the module's docstring
    from vodpoller.errors import ConfigError  # noqa: PLC0415 - see the module's docstring

    try:
        return load(path, env=os.environ)
    except ConfigError as error:
        _fail(error.problems, EXIT_CONFIG)


def _opened(open_it: Any) -> Any:
    from vodpoller.errors import ConfigError, JournalError  # noqa: PLC0415 - see the module's docstring

    try:
        return open_it()
    except ConfigError as error:
        _fail(error.problems, EXIT_CONFIG)
    except JournalError as error:
        _fail([str(error)], EXIT_FAILURE)


def _make_logger(config: "Config") -> "Logger":
    from vodpoller.logs import make_logger  # noqa: PLC0415 - see the module's docstring

    return make_logger(
        sys.stderr,
        level=config.log.level,
        log_format=config.log.format,
        secrets=lambda: [secret.get() for secret in config.secrets()],
        journal_stream=os.environ.get("JOURNAL_STREAM", ""),
    )


def _fail(problems: Any, code: int) -> NoReturn:
    for problem in problems:
        click.echo(f"vodpoller: {problem}", err=True)
    sys.exit(code)
