"""The entrance: one TOML file becomes a `Config`, or one error that lists all its problems in plain words."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vodpoller.config.credentials import find_credentials, key_renewal
from vodpoller.config.draft import Draft, Problems
from vodpoller.config.model import Config
from vodpoller.config.permissions import exposed_secrets, warn_of_readers
from vodpoller.config.reading import read_file, replace_variables
from vodpoller.config.references import check_references, find_coverage
from vodpoller.config.tables import Api, Daemon, Journal, Log, Route, Source
from vodpoller.config.validation import Validation
from vodpoller.errors import ConfigError
from vodpoller.secret import Surroundings


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
        where: The beginning of each problem: the name of the file.
        base: The folder of secret files that have a relative name, unless `$CREDENTIALS_DIRECTORY` is set.
        env: As for `load`.
        needs_key: As for `load`.
        for_unit: As for `load`.

    Raises:
        ConfigError: The data cannot be used. The error holds all problems.
    """
    directory = env.get("CREDENTIALS_DIRECTORY")
    problems = Problems()
    draft = Draft(
        data=replace_variables(data, env=env, problems=problems),
        env=env,
        surroundings=Surroundings(base=base, credentials_directory=Path(directory) if directory else None),
        problems=problems,
    )
    config = _config_of(draft, needs_key=needs_key, for_unit=for_unit)
    if config is None:
        raise ConfigError([f"{where}: {problem}" for problem in draft.lines(problems)])
    return config


def _config_of(draft: Draft, *, needs_key: bool, for_unit: bool) -> Config | None:
    """The configuration, or None if there is a problem."""
    validation = Validation(draft)
    validation.check_tables()
    api = validation.table("api", Api, lambda table: _with_region(table, draft.env))
    credentials = find_credentials(draft, validation, needs_key=needs_key)
    sources = validation.items("sources", Source, '[[sources]] with name = "main"')
    routes = validation.items("routes", Route, '[[routes]] with name = "all" and sinks = ["archive"]')
    sinks, sink_classes = validation.sinks()
    journal = validation.table("journal", Journal)
    log = validation.table("log", Log)
    daemon = validation.table("daemon", Daemon)
    check_references(draft, sinks=sinks, journal=journal, api=api)
    if for_unit:
        warn_of_readers(draft, sink_classes)
    coverage = find_coverage(draft)
    if draft.problems.found:
        return None
    if not (api and credentials and journal and log and daemon):
        raise AssertionError("a table is missing without a problem that says so")
    return Config(
        api=api,
        credentials=credentials,
        sources=tuple(sources),
        routes=tuple(routes),
        sinks=sinks,
        sink_classes=sink_classes,
        journal=journal,
        log=log,
        daemon=daemon,
        coverage=coverage,
        key_renewal=key_renewal(credentials, draft.surroundings),
        warnings=tuple(draft.lines(draft.warnings)),
    )


def _with_region(table: Mapping[str, Any], env: Mapping[str, str]) -> dict[str, Any]:
    region = env.get("TENCENTCLOUD_REGION")
    return {**({"region": region} if region else {}), **table}
