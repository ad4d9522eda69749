"""`[[sources]]` with `type = "callback"`."""

from ipaddress import ip_network

import pytest

from vodpoller.config import callbacks
from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.load import from_dict
from vodpoller.config.load import load as load_file
from vodpoller.config.schema import json_schema
from vodpoller.config.tables import Source
from vodpoller.errors import ConfigError

KEY = {"TENCENTCLOUD_SECRET_ID": "an-id-of-a-key", "TENCENTCLOUD_SECRET_KEY": "the-key-itself"}
CALLBACK = {"name": "pushed", "type": "callback", "listen": "127.0.0.1:8088", "path": "/vod"}


def load(folder, *sources, env=None, **tables):
    data = {
        "sources": [*sources],
        "routes": [{"name": "all", "sinks": ["archive"]}],
        "sinks": {"archive": {"type": "file", "path": str(folder / "events.jsonl")}},
        "journal": {"path": str(folder / "journal.db")},
        **tables,
    }
    return from_dict(data, where="config.toml", base=folder, env=env or {})


def problems_of(folder, *sources, **tables):
    with pytest.raises(ConfigError) as caught:
        load(folder, *sources, **tables)
    return [problem.removeprefix("config.toml: ") for problem in caught.value.problems]


@pytest.mark.parametrize("key", ["interval_secs", "long_poll", "max_concurrent_pulls"])
def test_a_pull_key_at_a_callback_source_is_refused(tmp_path, key):
    (problem,) = problems_of(tmp_path, {**CALLBACK, key: 1})
    assert problem.startswith(
        f"sources.pushed.{key}: this key does not exist here (it belongs under [[sources]] with type"
    )
    assert '"pull"' in problem


@pytest.mark.parametrize(
    "key",
    ["listen", "path", "sign_key", "sign_key_file", "allow_from", "forwarded_from", "max_events_in_flight"],
)
def test_a_callback_key_at_a_pull_source_is_refused(tmp_path, key):
    (problem,) = problems_of(tmp_path, {"name": "main", key: "x"}, env=KEY)
    assert problem.startswith(f"sources.main.{key}: this key does not exist here (it belongs under ")
    assert '[[sources]] with type = "callback"' in problem


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"listen": None}, "listen", "must be text"),
        ({"listen": "8088"}, "listen", "is not an address with a port"),
        ({"listen": "0.0.0.0:0"}, "listen", "is not an address with a port"),
        ({"listen": "localhost:8088"}, "listen", "has a name instead of an IP address"),
        ({"path": "vod"}, "path", "is not the path of a URL"),
        ({"path": "/vod?key=1"}, "path", "is not the path of a URL"),
        ({"unrouted": "leave"}, "unrouted", '"leave" would lose events'),
        ({"on_failure": "leave"}, "on_failure", '"leave" would lose events'),
        ({"allow_from": ["10.0.0.1/8"]}, "allow_from", '"10.0.0.1/8" is not an address or a network'),
        ({"allow_from": []}, "allow_from", "is empty"),
        ({"forwarded_from": "10.0.0.0/8"}, "forwarded_from", "must be a list"),
        ({"max_events_in_flight": 0}, "max_events_in_flight", "0 is too small"),
        ({"max_connections": 10**6}, "max_connections", "is too large"),
        ({"sign_key_file": "none"}, "sign_key_file", "cannot be read"),
        ({"sign_key": "a", "sign_key_file": "none"}, "sign_key_file", "given together with sign_key"),
    ],
)
def test_a_wrong_value_is_a_problem_that_names_its_key(tmp_path, changes, key, words):
    (problem,) = problems_of(tmp_path, CALLBACK | changes)
    assert problem.startswith(f"sources.pushed.{key}: ")
    assert words in problem


def test_the_extra_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(callbacks, "CALLBACK_MODULES", ("h11", "no_such_module"))
    (problem,) = problems_of(tmp_path, CALLBACK)
    assert "pip install 'vodpoller[callback]'" in problem


def test_an_unknown_type_names_those_that_exist(tmp_path):
    problems = problems_of(tmp_path, {"name": "main", "type": "callbacks"}, env=KEY)
    assert problems == [
        'sources.main.type: "callbacks" is not known (did you mean "callback"? one of "pull", "callback")'
    ]


def test_two_sources_with_one_path_at_one_address_are_refused(tmp_path):
    (problem,) = problems_of(tmp_path, CALLBACK, CALLBACK | {"name": "other"})
    assert problem == "sources.other.path: sources.pushed has the same path and listen (give each its own path)"


def test_two_sources_share_an_address_with_different_paths(tmp_path):
    config = load(tmp_path, CALLBACK, CALLBACK | {"name": "other", "path": "/other"})
    assert config.callback_addresses == ("127.0.0.1:8088",)


def test_the_listeners_address_is_refused_for_callbacks(tmp_path):
    problems = problems_of(tmp_path, CALLBACK, listener={"address": "127.0.0.1:8088"})
    assert problems == ["sources.pushed.listen: listener.address is the same (give each its own port)"]


@pytest.mark.parametrize(
    ("one", "other"),
    [("127.0.0.1:8088", "0.0.0.0:8088"), ("[::]:8088", "[::1]:8088"), ("[::1]:8088", "[0:0::1]:8088")],
)
def test_addresses_that_conflict_are_refused(tmp_path, one, other):
    sources = CALLBACK | {"listen": one, "sign_key": "k" * 16}, CALLBACK | {"name": "b", "listen": other, "path": "/b"}
    (problem,) = problems_of(tmp_path, *sources)
    assert problem.startswith(f'sources.b.listen: sources.pushed.listen = "{one}" uses the same port')
    (problem,) = problems_of(tmp_path, sources[1], listener={"address": one, "hosts": ["x"], "unauthenticated": True})
    assert problem.startswith(f'sources.b.listen: listener.address = "{one}" uses the same port')


@pytest.mark.parametrize("other", ["127.0.0.1:8089", "127.0.0.2:8088", "[::1]:8088", "[::]:8088"])
def test_addresses_that_do_not_conflict_are_accepted(tmp_path, other):
    load(tmp_path, CALLBACK, CALLBACK | {"name": "b", "listen": other, "path": "/b"})


def test_events_without_a_route_require_unrouted_and_not_leave(tmp_path):
    routes = [{"name": "some", "sinks": ["archive"], "event_types": ["NewFileUpload"]}]
    (problem,) = problems_of(tmp_path, CALLBACK, routes=routes)
    assert problem.startswith("sources.pushed.unrouted: is missing")
    assert "leave" not in problem


def test_without_a_source_that_pulls_no_key_is_needed(tmp_path):
    config = load(tmp_path, CALLBACK)
    assert (config.pulled, [source.name for source in config.callbacks]) == ((), ["pushed"])


@pytest.mark.parametrize(
    ("credentials", "missing"),
    [
        ({}, ["secret_id", "secret_key"]),
        ({"provider": "cvm_role"}, []),
        ({"provider": "assume_role"}, ["role_arn", "secret_id", "secret_key"]),
    ],
)
def test_a_sink_that_signs_needs_the_key_like_a_source_that_pulls(tmp_path, credentials, missing):
    sink = {"type": "tencent", "service": "eb", "version": "2021-04-16", "action": "PutEvents", "params": "{E: @}"}
    tables = {"sinks": {"archive": sink}, "credentials": credentials}
    if missing:
        problems = problems_of(tmp_path, CALLBACK, **tables)
        assert sorted(problem.split(": ")[0] for problem in problems) == [f"credentials.{key}" for key in missing]
    else:
        assert load(tmp_path, CALLBACK, **tables).role is not None


def test_with_a_source_that_pulls_the_key_is_needed(tmp_path):
    problems = problems_of(tmp_path, CALLBACK, {"name": "main"})
    assert {problem.partition(":")[0] for problem in problems} == {"credentials.secret_id", "credentials.secret_key"}


def test_both_types_of_sources_may_share_an_application(tmp_path):
    pulled = {"name": "main", "sub_app_id": 7}
    config = load(tmp_path, CALLBACK | {"sub_app_id": 7}, pulled, env=KEY)
    assert [source.sub_app_id for source in config.sources] == [7, 7]


def test_the_sign_key_is_a_secret_of_the_configuration(tmp_path):
    (tmp_path / "key").write_text("short\n")
    config = load(tmp_path, CALLBACK | {"sign_key_file": "key"})
    assert "short" in [secret.get() for secret in config.secrets()]
    assert any(line.startswith("sources.pushed.sign_key: it is too short") for line in config.all_warnings())


def test_networks_are_read(tmp_path):
    (source,) = load(tmp_path, CALLBACK | {"allow_from": ["10.0.0.0/8", "::1"]}).callbacks
    assert source.allow_from == (ip_network("10.0.0.0/8"), ip_network("::1"))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"listen": "0.0.0.0:8088"}, "sign_key_file"),
        ({"forwarded_from": ["127.0.0.1"]}, "forwarded_from"),
    ],
)
def test_a_probable_mistake_is_a_warning(tmp_path, changes, key):
    (warning,) = load(tmp_path, CALLBACK | changes).warnings
    assert warning.startswith(f"sources.pushed.{key}: ")


@pytest.mark.parametrize("changes", [{"sign_key": "k" * 20}, {"allow_from": ["10.0.0.0/8"]}])
def test_with_a_sign_key_or_networks_there_is_no_warning(tmp_path, changes):
    assert not load(tmp_path, CALLBACK | {"listen": "0.0.0.0:8088"} | changes).warnings


def test_a_sign_key_in_a_file_that_all_may_read_is_a_warning(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(
        '[[sources]]\nname = "pushed"\ntype = "callback"\nlisten = "127.0.0.1:8088"\npath = "/vod"\n'
        'sign_key = "the-key-that-is-set-at-vod"\n[[routes]]\nname = "all"\nsinks = ["archive"]\n'
        f'[sinks.archive]\ntype = "file"\npath = "{tmp_path}/events.jsonl"\n[journal]\npath = "{tmp_path}/journal.db"\n'
    )
    path.chmod(0o644)
    (warning,) = load_file(path, env={}).warnings
    assert warning.startswith("sources.pushed.sign_key: is a secret in a file that every user")
    path.chmod(0o640)
    assert not load_file(path, env={}).warnings


def test_the_schema_has_the_keys_of_each_type():
    schema = json_schema()
    items = schema["properties"]["sources"]["items"]
    keys = {way: set(schema["$defs"][items[way]["$ref"].rpartition("/")[2]]["properties"]) for way in ("then", "else")}
    assert keys["then"] == set(CallbackSource.model_fields)
    assert keys["else"] == set(Source.model_fields)
