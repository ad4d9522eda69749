"""`vodpoller simulate`."""

from pathlib import Path
from typing import Any

import click

from vodpoller.cli.exits import EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.simulator.options import SimulatorOptions, parse_faults
from vodpoller.simulator.service import serve


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
@click.option("--port", default=0, show_default=True, help="The port to listen on; 0 takes a free one.")
@click.option("--events", default=0, show_default=True, help="Generated events in the queue at the start.")
@click.option("--rate", default=0.0, show_default=True, help="Events per second that are born while it runs.")
@click.option("--feed", default=0, show_default=True, help="Total number of events that --rate brings; 0 for no end.")
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
    "--mode",
    type=click.Choice(["PULL", "PUSH"]),
    help="What DescribeEventConfig says: reliable callbacks, or normal ones, with which pulls bring nothing."
    "  [default: PUSH with --push, else PULL]",
)
@click.option("--push", metavar="URL", help="Post events to this URL while the mode is PUSH, as normal callbacks are.")
@click.option("--push-sign-key", metavar="KEY", help="Put Sign and T into what is posted.  [default: do not]")
@click.option("--push-limit-secs", default=5.0, show_default=True, help="The time that a post has to be answered.")
@click.option("--push-tries", default=3, show_default=True, help="Posts of an event at most; any answer ends them.")
@click.option(
    "--events-off",
    metavar="TYPE",
    multiple=True,
    help="DescribeEventConfig says that this is switched off: NewFileUpload, FileDeleted or PersistenceComplete.",
)
@click.option(
    "--deny",
    metavar="ACTION",
    multiple=True,
    help="The key has no right to this action: UnauthorizedOperation. May be repeated.",
)
@click.option("--secret-id", help="Verify signatures: the SecretId.  [default: verify nothing]")
@click.option("--secret-key", help="The SecretKey that belongs to it.")
@click.option("--token", help="The temporary token that requests must carry.")
@click.option(
    "--credential-secs",
    default=0.0,
    help="Serve the metadata service and STS, too; temporary keys live so long, and requests must be signed with one.",
)
@click.option(
    "--faults",
    default="",
    help="Probabilities, as in reset=0.02,confirm.lost=0.1: reset, http_5xx, internal_error and limit keep a request"
    " from being carried out; truncated, slow and lost spoil the answer. Also of one action: pull.NAME,"
    " confirm.NAME, config.NAME, state.NAME. Posts know push.reset, push.slow and push.lost, which spare one post of"
    " each event.",
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
    With --push it prints at its end the events that VOD would have lost: no post was answered.
    """
    try:
        options["faults"] = parse_faults(options["faults"])
        wanted = SimulatorOptions(**options)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    try:
        lost = serve(wanted, None, click.echo, lambda message: click.echo(f"vodpoller: {message}", err=True))
    except OSError as error:
        fail([f"the simulator cannot start: {error}"], EXIT_FAILURE)
    if lost or wanted.push is not None:
        click.echo(f"vodpoller: events that are lost, none of whose posts was answered: {len(lost)}", err=True)
    for row in lost:
        click.echo(row["body"])
