"""`vodpoller route`."""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import click

from vodpoller.cli.configuration import config_option
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE
from vodpoller.cli.failure import fail
from vodpoller.config.load import load_routing
from vodpoller.config.model import Routing
from vodpoller.config.tables import AnySource
from vodpoller.errors import ConfigError
from vodpoller.events.event import Event
from vodpoller.events.identity import has_own_id
from vodpoller.events.texts import FoundEvent, events_in
from vodpoller.logs import printable
from vodpoller.router import Router

_STDIN: Final = "-"
_UNROUTED: Final = {
    "dead_letter": "becomes a dead letter",
    "confirm": "is confirmed and dropped",
    "leave": "is left with VOD, which delivers it again",
}


@click.command()
@click.argument("paths", metavar="EVENT.json...", nargs=-1, required=True)
@config_option
@click.option(
    "--source", "source_name", metavar="NAME", help="The source of the events; required if there are several sources."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per event and line.")
def route(paths: tuple[str, ...], config_path: Path, *, source_name: str | None, as_json: bool) -> None:
    """Print which routes take an event, which sinks get it, and why the other routes do not take it.

    Each file, or - for standard input, contains one event, a JSON list of events, one event per line, or an answer of
    PullEvents. Nothing is pulled, opened or delivered, and no secret is read. Exit code 1: something could not be read.
    """
    try:
        routing = load_routing(config_path, env=os.environ)
    except ConfigError as error:
        fail(error.problems, EXIT_CONFIG)
    source = _source_of(routing, source_name)
    router = Router(routing.routes)
    unreadable = False
    for path in paths:
        for found in _events_of(path, source):
            place = ", ".join(filter(None, (printable(path), found.place)))
            if found.event is None:
                click.echo(f"vodpoller: {place}: cannot be read: {printable(found.why)}", err=True)
                unreadable = True
            elif as_json:
                click.echo(_as_json(router, found.event))
            else:
                _explain(place, router, found.event, source)
    if unreadable:
        sys.exit(EXIT_FAILURE)


def _source_of(routing: Routing, name: str | None) -> AnySource:
    names = ", ".join(source.name for source in routing.sources)
    if name is None:
        if len(routing.sources) > 1:
            raise click.UsageError(f"the source of the events is not clear: add --source (sources: {names})")
        return routing.sources[0]
    for source in routing.sources:
        if source.name == name:
            return source
    raise click.BadParameter(f"the configuration has no source {name!r} (its sources: {names})", param_hint="--source")


def _events_of(path: str, source: AnySource) -> Iterator[FoundEvent]:
    try:
        data = sys.stdin.buffer.read() if path == _STDIN else Path(path).read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        yield FoundEvent(place="", why="it is not UTF-8 text")
        return
    except OSError as error:
        yield FoundEvent(place="", why=(error.strerror or str(error)).lower())
        return
    is_empty = True
    for found in events_in(text, source=source.name, sub_app_id=source.sub_app_id):
        is_empty = False
        yield found
    if is_empty:
        click.echo(f"vodpoller: {printable(path)}: an answer without an event", err=True)


def _as_json(router: Router, event: Event) -> str:
    judged = [{"name": it.route, "takes": it.takes, "why_not": it.why_not or None} for it in router.judge(event)]
    found = {"event_type": event.type, "key": _key_of(event), "routes": judged, "sinks": router.route(event).sinks}
    return json.dumps(found, ensure_ascii=False)


def _key_of(event: Event) -> str | None:
    """The key that the daemon will give the event; None if the key is made when the event arrives."""
    return event.key.hex() if has_own_id(event.content) else None


def _explain(place: str, router: Router, event: Event, source: AnySource) -> None:
    click.echo(f"{place}: {printable(event.type) or 'an event without EventType'}")
    click.echo(f"  key: {_key_of(event) or 'a new one at each arrival, because the event has no id of its own'}")
    for judgement in router.judge(event):
        if judgement.takes:
            click.echo(f"  route {judgement.route} takes it: {', '.join(judgement.sinks)}")
        else:
            click.echo(f"  route {judgement.route} does not: {printable(judgement.why_not)}")
    routed = router.route(event)
    for sink in routed.failed:
        click.echo(f"  sink {sink} rejects it: it becomes a dead letter")
    if routed.is_unrouted:
        similar = router.similar_routed(source.name, event.type)
        hint = f" (was {similar} to take it?)" if similar else ""
        click.echo(f"  no route takes it, so it {_UNROUTED[source.unrouted or 'dead_letter']}{hint}")
    elif routed.sinks:
        click.echo(f"  goes to: {', '.join(routed.sinks)}")
