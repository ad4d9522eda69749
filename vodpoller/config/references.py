"""The checks across tables: names, queues, files and events that must fit together."""

import os
from collections.abc import Collection, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from vodpoller.config.draft import Draft, Location, texts_in
from vodpoller.config.tables import LEASE_SECS, Api, Journal, Listener, host_of, port_of
from vodpoller.config.wording import LISTS, quoted, quoted_all, suggestion
from vodpoller.events.types import matches_documented, nearest_documented
from vodpoller.sinks.contract import SinkConfig
from vodpoller.vod.endpoint import is_loopback


def check_references(
    draft: Draft,
    *,
    sinks: Mapping[str, SinkConfig],
    journal: Journal | None,
    api: Api | None,
    listener: Listener | None,
) -> None:
    """Add a problem for each conflict between tables.

    Args:
        draft: The tables, and the problems.
        sinks: The sinks whose own tables are valid.
        journal: None if it is not valid.
        api: None if it is not valid.
        listener: None if it is not valid.
    """
    _check_names(draft)
    _check_sub_app_ids(draft)
    _check_callbacks(draft, listener)
    _check_routes(draft)
    _check_event_types(draft)
    _check_claims(draft, sinks, journal)
    _check_lease(draft, api)
    _check_listener(draft, listener)


def _check_names(draft: Draft) -> None:
    for table in LISTS:
        first = draft.names(table)
        for at, item in draft.items(table):
            if first.get(str(item.get("name")), at) != at:
                draft.problems.add(
                    (table, at, "name"), f"another of the {table} has this name (give each its own name)"
                )


def _check_sub_app_ids(draft: Draft) -> None:
    first: dict[int | None, int] = {}
    for at, item in draft.items("sources"):
        if item.get("type") == "callback":  # it takes no events from another source
            continue
        sub_app_id = item.get("sub_app_id")
        if isinstance(sub_app_id, int | None) and first.setdefault(sub_app_id, at) != at:
            other = draft.key(("sources", first[sub_app_id]))
            same = f"neither this source nor {other} has one" if sub_app_id is None else f"this is also that of {other}"
            draft.problems.add(
                ("sources", at, "sub_app_id"),
                f"{same}, and two sources that pull one queue take each other's events (give each its own SubAppId,"
                " or keep one source)",
            )


def _check_callbacks(draft: Draft, listener: Listener | None) -> None:
    first: dict[tuple[Any, Any], int] = {}
    for at, item in draft.items("sources"):
        if item.get("type") != "callback":
            continue
        listen, path = item.get("listen"), item.get("path")
        if isinstance(listen, str) and isinstance(path, str) and first.setdefault((listen, path), at) != at:
            other = draft.key(("sources", first[listen, path]))
            draft.problems.add(
                ("sources", at, "path"), f"{other} has the same path and listen (give each its own path)"
            )
        if listener is not None and listener.address is not None and listen == listener.address:
            draft.problems.add(("sources", at, "listen"), "listener.address is the same (give each its own port)")
        _warn_of_open_source(draft, at, item)
    _check_overlaps(draft, listener)


def _check_overlaps(draft: Draft, listener: Listener | None) -> None:
    """Find one address in two forms, or all addresses and one of them: the system allows only one of the sockets."""
    taken = {} if listener is None or listener.address is None else {listener.address: "listener.address"}
    for at, item in draft.items("sources"):
        where = ("sources", at, "listen")
        if item.get("type") != "callback" or not isinstance(item.get("listen"), str) or draft.problems.any_at(where):
            continue
        listen = item["listen"]
        for address, key in taken.items():
            if address != listen and _overlap(address, listen):
                draft.problems.add(
                    where,
                    f"{key} = {quoted(address)} uses the same port, and the system allows only one of the two"
                    " (write the same address if both are sources; or give each its own port)",
                )
                break
        taken.setdefault(listen, draft.key(where))


def _overlap(one: str, other: str) -> bool:
    try:
        hosts = [ip_address(host_of(address)) for address in (one, other)]
    except ValueError:  # the listener's host may be a name
        return False
    is_same = hosts[0] == hosts[1] or (
        hosts[0].version == hosts[1].version and any(host.is_unspecified for host in hosts)
    )
    return is_same and port_of(one) == port_of(other)


def _warn_of_open_source(draft: Draft, at: int, source: Mapping[str, Any]) -> None:
    """Warn of a callback source that accepts events from every machine that can reach it."""
    listen = source.get("listen")
    has_key = "sign_key" in source or "sign_key_file" in source
    if isinstance(listen, str) and not (has_key or "allow_from" in source or is_loopback(host_of(listen))):
        draft.warnings.add(
            ("sources", at, "sign_key_file"),
            "is missing, and so is allow_from: every machine that can reach the address can send events (set a key at"
            " VOD and here, or set allow_from, or listen on 127.0.0.1 behind a proxy)",
        )
    if "forwarded_from" in source and "allow_from" not in source:
        draft.warnings.add(
            ("sources", at, "forwarded_from"), "has no effect without allow_from (add allow_from, or delete this key)"
        )


def _check_routes(draft: Draft) -> None:
    used: set[str] = set()
    sinks = draft.data.get("sinks", {})
    for at, route in draft.items("routes"):
        used.update(texts_in(route.get("sinks")).values())
        _check_names_exist(draft, ("routes", at, "sources"), route.get("sources"), draft.names("sources"))
        if isinstance(sinks, dict):
            _check_names_exist(draft, ("routes", at, "sinks"), route.get("sinks"), sinks)
    for name in sinks if isinstance(sinks, dict) and draft.items("routes") else ():
        if name not in used:
            draft.problems.add(
                ("sinks", name), "no route uses this sink (name it in the sinks of a route, or delete it)"
            )


def _check_names_exist(draft: Draft, where: Location, names: Any, known: Collection[str]) -> None:
    kind = str(where[-1])
    for at, name in texts_in(names).items():
        if name not in known and not draft.problems.any_at((*where, at)):
            others = f"there are: {quoted_all(known)}" if known else f"there are no {kind} at all"
            draft.problems.add(
                where, f"the {kind[:-1]} {quoted(name)} does not exist ({suggestion(name, known)}{others})"
            )


def _check_event_types(draft: Draft) -> None:
    for at, route in draft.items("routes"):
        for glob in texts_in(route.get("event_types")).values():
            if matches_documented(glob):
                continue
            near = nearest_documented(glob)
            hint = f"did you mean {quoted(near)}? " if near else ""
            draft.warnings.add(
                ("routes", at, "event_types"),
                f"{quoted(glob)} matches no event type that Tencent documents ({hint}case matters; ignore this if the"
                " type is newer than this program)",
            )


def _check_claims(draft: Draft, sinks: Mapping[str, SinkConfig], journal: Journal | None) -> None:
    holders: dict[str, str] = {}
    if journal is not None:
        holders[f"file:{os.path.realpath(journal.path)}"] = "journal"
    for name, sink in sinks.items():
        for claim in sorted(sink.claims()):
            _check_holder(draft, name, claim, holders.setdefault(claim, f"sinks.{name}"))
    for name, sink in sinks.items():
        for claim in sorted(sink.shares()):
            _check_holder(draft, name, claim, holders.get(claim, f"sinks.{name}"))


def _check_holder(draft: Draft, name: str, claim: str, holder: str) -> None:
    if holder != f"sinks.{name}":
        draft.problems.add(("sinks", name), f"{holder} writes {claim.removeprefix('file:')} too (give each its own)")


def _check_lease(draft: Draft, api: Api | None) -> None:
    if api is not None and api.lease_secs > LEASE_SECS and not is_loopback(urlsplit(api.endpoint).hostname or ""):
        draft.warnings.add(
            ("api", "lease_secs"),
            f"{api.lease_secs:g} is more than the {LEASE_SECS:g} s after which VOD delivers events again, and nothing"
            " can extend this time: a later confirm fails (delete this key; only a simulator needs another value)",
        )


def _check_listener(draft: Draft, listener: Listener | None) -> None:
    if listener is None:
        return
    if listener.is_exposed:
        draft.problems.add(
            ("listener", "unauthenticated"),
            "is false, password_file is missing, and other machines can reach the address (set password_file; or"
            " unauthenticated = true, if everyone who can reach it may see its pages; or an address that only this"
            " machine can reach, such as 127.0.0.1:9464)",
        )
    if listener.is_wildcard and not listener.hosts:
        draft.warnings.add(
            ("listener", "hosts"),
            "is missing, and the address means all addresses of this machine: only requests from this machine will be"
            ' answered, apart from the two probes (set the hosts that requests name: hosts = ["vod.example"])',
        )


def find_coverage(draft: Draft) -> dict[str, bool]:
    """For each source, by its name: whether the routes take all its events. If not, `unrouted` must be set.

    Args:
        draft: The tables, and the problems.
    """
    routes = draft.items("routes")
    coverage = {}
    for at, source in draft.items("sources"):
        name = str(source.get("name"))
        covered = any(_takes_everything(route, name) for _, route in routes)
        coverage[name] = covered
        if routes and not covered and "unrouted" not in source:
            leave = "" if source.get("type") == "callback" else ', "leave" lets VOD deliver them again and again'
            draft.problems.add(
                ("sources", at, "unrouted"),
                "is missing, and the routes do not take every event of this source (choose what happens to the others:"
                f' "dead_letter" keeps them for a person, "confirm" drops them{leave})',
            )
    return coverage


def _takes_everything(route: Mapping[str, Any], source: str) -> bool:
    globs = route.get("event_types", ["*"])
    sources = route.get("sources", [source])
    return (
        "where" not in route
        and source in (sources if isinstance(sources, list) else [])
        and any(set(glob) == {"*"} for glob in texts_in(globs).values())
    )
