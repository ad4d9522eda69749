"""`vodpoller check`."""

import sys
from pathlib import Path
from typing import assert_never

import click

from vodpoller.cli.configuration import config_option, load_config
from vodpoller.cli.exits import EXIT_CONFIG, EXIT_FAILURE
from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.model import Config
from vodpoller.vod.credentials import AssumedRole, CvmRole


@click.command()
@config_option
@click.option(
    "--connect", is_flag=True, help="Also test the key, its rights at VOD, the clock, every sink and the journal."
)
@click.option("--strict", is_flag=True, help="Exit code 78 if there is a warning about the configuration.")
def check(config_path: Path, *, connect: bool, strict: bool) -> None:
    """Validate the configuration and print a summary of it. Consumes no event and writes nothing."""
    config = load_config(config_path, for_unit=True)
    click.echo(f"{config_path}: valid")
    warnings = config.all_warnings()
    for warning in warnings:
        click.echo(f"{config_path}: warning: {warning}", err=True)
    for source in config.sources:
        app = f"SubAppId {source.sub_app_id}" if source.sub_app_id else "the account's main application"
        coverage = "every event has a route" if config.coverage[source.name] else f"other events: {source.unrouted}"
        origin = f"at {config.api.endpoint}"
        if isinstance(source, CallbackSource):
            signed = "signed" if source.sign_key else "not signed"
            origin = f"by callbacks to {source.listen}{source.path}, {signed}"
        click.echo(f"  source {source.name}: {app} {origin}; {coverage}")
    for route in config.routes:
        types = ", ".join(route.event_types) if route.event_types else "all events"
        condition = f" where {route.where}" if route.where else ""
        click.echo(f"  route {route.name}: {types}{condition} -> {', '.join(route.sinks)}")
    for name, sink in config.sinks.items():
        place = sink.place()
        click.echo(f"  sink {name}: {sink.type}{f', {place}' if place else ''}")
    if config.role is not None or config.credentials.origins:
        click.echo(f"  key: {_key_of(config)}")
    is_ready = True
    if connect:
        from vodpoller.cli.connections import show_connections  # noqa: PLC0415 - without --connect, requests is not needed

        is_ready = show_connections(config)
    if strict and warnings:
        sys.exit(EXIT_CONFIG)
    if not is_ready:
        sys.exit(EXIT_FAILURE)


def _key_of(config: Config) -> str:
    """Where the key comes from, and what the operator does to make the daemon use a new one."""
    origins = ", ".join(f"{name} from {origin}" for name, origin in config.credentials.origins.items())
    given = f"{origins}; after a change of it, {config.key_renewal}"
    match config.role:
        case None:
            return given
        case CvmRole():
            return f"{config.role}; it is renewed automatically"
        case AssumedRole():
            return f"{config.role}; it is renewed automatically. The permanent key: {given}"
        case _:
            assert_never(config.role)
