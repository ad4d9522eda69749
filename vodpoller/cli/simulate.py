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
@click.option("--events", default=0, show_default=True, help="Number of generated events in the queue at the start.")
@click.option("--rate", default=0.0, show_default=True, help="Events per second that are generated while it runs.")
@click.option(
    "--feed", default=0, show_default=True, help="Total number of events that --rate generates; 0 for no limit."
)
@click.option(
    "--events-file", type=click.Path(path_type=Path), help="A file with event bodies to serve, one per line, unchanged."
)
@click.option("--poll-secs", default=5.0, show_default=True, help="Maximum time that a pull of an empty queue waits.")
@click.option("--visibility-secs", default=30.0, show_default=True, help="The lease of a pulled event.")
@click.option("--batch", default=16, show_default=True, help="Maximum number of events per pull.")
@click.option("--requests-per-sec", default=100.0, show_default=True, help="The quota of each action; 0 for no quota.")
@click.option("--confirms-per-sec", type=float, help="The quota of confirms.  [default: as --requests-per-sec]")
@click.option("--rtt-secs", default=0.0, show_default=True, help="The round trip of each request.")
@click.option(
    "--empty",
    type=click.Choice(["null", "error", "list", "absent", "mixed"]),
    default="null",
    show_default=True,
    help="The answer to a pull of an empty queue.",
)
@click.option(
    "--stale",
    type=click.Choice(["atomic", "per_handle"]),
    default="atomic",
    show_default=True,
    help="Whether a confirm with a stale or refused handle confirms its other handles (per_handle) or none (atomic).",
)
@click.option("--sub-app-id", type=int, help="The only SubAppId that exists.  [default: any]")
@click.option(
    "--mode",
    type=click.Choice(["PULL", "PUSH"]),
    help="The mode in DescribeEventConfig: PULL, reliable callbacks; PUSH, normal ones, and pulls bring no events."
    "  [default: PUSH with --push, else PULL]",
)
@click.option("--push", metavar="URL", help="Post events to this URL while the mode is PUSH, as normal callbacks.")
@click.option("--push-sign-key", metavar="KEY", help="Sign each post: add Sign and T.  [default: not signed]")
@click.option("--push-limit-secs", default=5.0, show_default=True, help="The time limit for the answer to a post.")
@click.option(
    "--push-tries", default=3, show_default=True, help="Maximum number of posts per event; any answer ends them."
)
@click.option(
    "--events-off",
    metavar="TYPE",
    multiple=True,
    help="A type that is switched off in DescribeEventConfig: NewFileUpload, FileDeleted or PersistenceComplete.",
)
@click.option(
    "--deny",
    metavar="ACTION",
    multiple=True,
    help="The key has no right to this action: UnauthorizedOperation. May be repeated.",
)
@click.option("--secret-id", help="The SecretId for verifying signatures.  [default: not verified]")
@click.option("--secret-key", help="The SecretKey that belongs to it.")
@click.option("--token", help="The temporary token that requests must carry.")
@click.option(
    "--credential-secs",
    default=0.0,
    help="The life of temporary keys. With it, the metadata service and STS are served, too, and requests must be"
    " signed with such a key.",
)
@click.option(
    "--faults",
    default="",
    help="Probabilities of faults, as in reset=0.02,confirm.lost=0.1. With reset, http_5xx, internal_error and limit a"
    " request is not carried out; with truncated, slow and lost it is, but the answer is cut off, late or never sent."
    " For one action: pull.NAME, confirm.NAME, config.NAME, state.NAME. For posts: push.reset, push.slow and push.lost,"
    " which spare one post of each event.",
)
@click.option("--slow-secs", default=3.0, show_default=True, help="The delay that the fault `slow` adds.")
@click.option(
    "--forget-confirms",
    default=0,
    show_default=True,
    help="Number of handles, the first to be confirmed, that are refused during their lease: their events come again.",
)
@click.option(
    "--clock-skew-secs", default=0.0, show_default=True, help="Number of seconds by which its clock is ahead."
)
@click.option("--keep-bodies", is_flag=True, help="Keep the bodies of confirmed events for /_ledger?bodies=1.")
@click.option("--seed", type=int, help="The seed of everything random.")
def simulate(**options: Any) -> None:
    """Run the VOD event API on this machine: vodpoller and the official SDKs work against it.

    Prints its URL. GET /_stats and /_ledger show what happened; POST /_feed adds bodies to the queue, POST /_control
    changes options. With --push it prints, when it ends, the events that VOD would have lost: no post was answered.
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
        click.echo(f"vodpoller: number of lost events (no post of them was answered): {len(lost)}", err=True)
    for row in lost:
        click.echo(row["body"])
