"""The entrance: one TOML file becomes a `Config`, or one error that lists all its problems in plain words."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vodpoller.config.credentials import find_credentials, key_renewal
from vodpoller.config.draft import Draft, Problems
from vodpoller.config.model import Config, Routing
from vodpoller.config.permissions import exposed_secrets, warn_of_readers
from vodpoller.config.reading import read_file, replace_variables
from vodpoller.config.references import check_references, find_coverage
from vodpoller.config.tables import AnySource, Api, Daemon, Journal, Listener, Log, Route
from vodpoller.config.validation import Validation
from vodpoller.errors import ConfigError
from vodpoller.secret import ConfigContext


def load(path: Path, *, env: Mapping[str, str], needs_key: bool = True, for_unit: bool = False) -> Config:
    """Read and validate the file.

    Args:
        path: The TOML file.
        env: The environment: `${VAR}` in texts, the API key if the file does not give it, `$CREDENTIALS_DIRECTORY`.
        needs_key: False if the caller will not call VOD: a key that is not found is then empty.
        for_unit: Whether to warn root of secrets that only root can read: the unit runs as another user.

    Raises:
        ConfigError: The file cannot be used. The error holds all problems; if the text is not TOML, the first one.
    """
    data = read_file(path)
    config = from_dict(data, where=str(path), base=path.parent, env=env, needs_key=needs_key, for_unit=for_unit)
    return replace(config, warnings=(*config.warnings, *exposed_secrets(path, data)))


def from_dict(
    data: Mapping[str, Any],
    *,
    where: str,
    base: Path,
    env: Mapping[str, str],
    needs_key: bool = True,
    for_unit: bool = False,
) -> Config:
    """Validate data as a TOML file would hold it.

    Args:
        data: The tables.
        where: The name of the file, with which each problem begins.
        base: The folder of secret files with a relative name, unless `$CREDENTIALS_DIRECTORY` is set.
        env: As for `load`.
        needs_key: As for `load`.
        for_unit: As for `load`.

    Raises:
        ConfigError: The data cannot be used. The error holds all problems.
    """
    draft = _draft_of(data, base=base, env=env)
    config = _config_of(draft, needs_key=needs_key, for_unit=for_unit)
    if config is None:
        raise _error_of(draft, where)
    return config


def load_routing(path: Path, *, env: Mapping[str, str]) -> Routing:
    """Read only the part of the file that says where events go. Secrets, and what sinks need, may be missing.

    Args:
        path: As for `load`.
        env: As for `load`.

    Raises:
        ConfigError: This part of the file cannot be used. The error holds all its problems.
    """
    data = read_file(path)
    sinks = data.get("sinks", {})
    part: dict[str, Any] = {name: data[name] for name in ("sources", "routes") if name in data}
    # Routes need only the names of the sinks.
    part["sinks"] = {name: {} for name in sinks} if isinstance(sinks, dict) else sinks
    draft = _draft_of(part, base=path.parent, env=env)
    validation = Validation(draft)
    sources, routes = _sources_and_routes(validation)
    check_references(draft, sinks={}, journal=None, api=None, listener=None)
    find_coverage(draft)
    if draft.problems.found:
        raise _error_of(draft, str(path))
    return Routing(sources=sources, routes=routes)


def _draft_of(data: Mapping[str, Any], *, base: Path, env: Mapping[str, str]) -> Draft:
    directory = env.get("CREDENTIALS_DIRECTORY")
    problems = Problems()
    return Draft(
        data=replace_variables(data, env=env, problems=problems),
        env=env,
        context=ConfigContext(base=base, credentials_directory=Path(directory) if directory else None),
        problems=problems,
    )


def _error_of(draft: Draft, where: str) -> ConfigError:
    return ConfigError([f"{where}: {problem}" for problem in draft.lines(draft.problems)])


def _sources_and_routes(validation: Validation) -> tuple[tuple[AnySource, ...], tuple[Route, ...]]:
    sources = validation.sources()
    routes = validation.items("routes", lambda _table: Route, '[[routes]] with name = "all" and sinks = ["archive"]')
    return tuple(sources), tuple(routes)


def _may_pull(draft: Draft) -> bool:
    """Whether a source may pull: only then is the API key needed."""
    items = draft.items("sources")
    return not items or any(source.get("type") != "callback" for _, source in items)


def _config_of(draft: Draft, *, needs_key: bool, for_unit: bool) -> Config | None:
    """The configuration, or None if there is a problem."""
    validation = Validation(draft)
    validation.check_tables()
    api = validation.table("api", Api, lambda table: _with_region(table, draft.env))
    sources, routes = _sources_and_routes(validation)
    sinks, sink_classes = validation.sinks()
    is_key_used = _may_pull(draft) or any(sink_class.needs_key for sink_class in sink_classes.values())
    credentials = find_credentials(draft, validation, needs_key=needs_key and is_key_used)
    journal = validation.table("journal", Journal)
    log = validation.table("log", Log)
    daemon = validation.table("daemon", Daemon)
    listener = validation.table("listener", Listener)
    check_references(draft, sinks=sinks, journal=journal, api=api, listener=listener)
    if for_unit:
        warn_of_readers(draft, sink_classes)
    coverage = find_coverage(draft)
    if draft.problems.found:
        return None
    if not (api and credentials and journal and log and daemon and listener):
        raise AssertionError("a table is missing without a problem that says so")
    return Config(
        api=api,
        credentials=credentials.key,
        role=credentials.role,
        sources=sources,
        routes=routes,
        sinks=sinks,
        sink_classes=sink_classes,
        journal=journal,
        log=log,
        daemon=daemon,
        listener=listener,
        coverage=coverage,
        key_renewal=key_renewal(credentials.key, draft.context),
        warnings=tuple(draft.lines(draft.warnings)),
    )


def _with_region(table: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    region = env.get("TENCENTCLOUD_REGION")
    return {**({"region": region} if region else {}), **table}
