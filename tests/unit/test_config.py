import gc
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from vodpoller.checkup.places import files_of_sinks
from vodpoller.config import load as config
from vodpoller.config import permissions, tables, validation
from vodpoller.config.callbacks import CallbackSource
from vodpoller.config.credentials import KEYS_OF_A_GIVEN_KEY, KEYS_OF_ROLES
from vodpoller.config.model import Config
from vodpoller.config.schema import json_schema
from vodpoller.config.tables import TABLES, AnySource
from vodpoller.errors import ConfigError
from vodpoller.secret import HasSecrets, Secret
from vodpoller.sinks.contract import SinkConfig
from vodpoller.sinks.registry import available_sinks
from vodpoller.sinks.sql.config import SqlConfig
from vodpoller.vod.credentials import Credentials, CvmRole, IssuedKey

ENV = {"TENCENTCLOUD_SECRET_ID": "AKIDfromenv", "TENCENTCLOUD_SECRET_KEY": "keyfromenv"}
WEBHOOK_SECRET = "whsec_MDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIz"
EXAMPLE = Path(__file__).parents[2] / "config.example.toml"

SOURCE = """
[[sources]]
name = "main"
unrouted = "dead_letter"
"""
ROUTE = """
[[routes]]
name = "all"
sinks = ["archive"]
"""
SINK = """
[sinks.archive]
type = "file"
path = "/var/lib/vodpoller/events.jsonl"
"""
VALID = SOURCE + ROUTE + SINK


class NoSink:
    """Not a sink, although an entry point names it."""


def load(text: str, folder: Path, env: Mapping[str, str] = ENV) -> Config:
    path = folder / "config.toml"
    path.write_text(text, encoding="utf-8")
    return config.load(path, env=env)


def problems_of(text: str, folder: Path, env: Mapping[str, str] = ENV) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(text, folder, env)
    assert all(problem.startswith(f"{folder / 'config.toml'}: ") for problem in caught.value.problems)
    assert all("\n" not in problem for problem in caught.value.problems)
    return tuple(problem.removeprefix(f"{folder / 'config.toml'}: ") for problem in caught.value.problems)


def replaced(old: str, new: str) -> str:
    assert old in VALID
    return VALID.replace(old, new)


# --- valid values that are probably mistakes


@pytest.mark.parametrize(
    ("types", "words"),
    [
        ('["CreateSnapshotByTimeOffsetCompleted"]', ['"CreateSnapshotByTimeOffsetCompleted"', "did you mean"]),
        ('["NewFileUpload", "snapshotby*"]', ['"snapshotby*"', 'mean "CreateSnapshotByTimeOffsetComplete"?']),
        ('["HologramRenderComplete"]', ["HologramRenderComplete", "newer than this program"]),
    ],
)
def test_an_event_type_that_is_not_documented_is_a_warning(types, words, tmp_path):
    found = load(replaced('name = "all"', f'name = "all"\nevent_types = {types}'), tmp_path)

    (warning,) = found.warnings
    assert warning.startswith("routes.all.event_types: ")
    for word in words:
        assert word in warning


@pytest.mark.parametrize("types", ['["NewFileUpload", "*Complete"]', '["*"]'])
def test_a_documented_event_type_is_not_a_warning(types, tmp_path):
    assert load(replaced('name = "all"', f'name = "all"\nevent_types = {types}'), tmp_path).warnings == ()


# --- paths


PATHS = """
[sinks.images]
type = "download"
path = "{images}/{{file_id}}/{{index}}.{{ext}}"
hosts = ["*"]
[sinks.script]
type = "exec"
command = ["/bin/true", "$x", "~"]
cwd = "{cwd}"
[sinks.hook]
type = "webhook"
url = "https://app.example/~me/$1"
secret_file = "{secret}"
headers = {{ path = "$not-a-path", some_file = "~" }}
[journal]
path = "{journal}"
[credentials]
secret_id_file = "{key}"
secret_key_file = "{key}"
"""
ROUTED = replaced('sinks = ["archive"]', 'sinks = ["archive", "images", "script", "hook"]')


def with_paths(**paths: str) -> str:
    defaults = {name: f"/srv/{name}" for name in ("images", "cwd", "secret", "journal", "key")}
    return ROUTED + PATHS.format(**{**defaults, **paths})


@pytest.mark.parametrize("home", ["/home/me", "/home/me/", "/"])
def test_a_tilde_is_the_home_folder_in_every_path(home, tmp_path):
    env = {**ENV, "HOME": str(tmp_path / home.strip("/")) + home[-1:]}
    folder = Path(env["HOME"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "key").write_text("k" * 8)
    (folder / "secret").write_text(WEBHOOK_SECRET)
    text = with_paths(images="~/images", cwd="~", secret="~/secret", journal="~/${NAME}.db", key="~/key")
    found = load(
        text.replace('path = "/var/lib/vodpoller/events.jsonl"', "path = '~/events.jsonl'"),
        tmp_path,
        {**env, "NAME": "j~"},
    )
    sinks: Any = found.sinks
    assert sinks["archive"].path == str(folder / "events.jsonl")
    assert sinks["images"].path == str(folder) + "/images/{file_id}/{index}.{ext}"
    assert Path(sinks["script"].cwd) == folder
    assert sinks["script"].command == ("/bin/true", "$x", "~")
    assert sinks["hook"].headers == {"path": "$not-a-path", "some_file": "~"}
    assert sinks["hook"].secret.get() == WEBHOOK_SECRET
    assert found.journal.path == folder / "j~.db"
    assert found.credentials.secret_key.get() == "k" * 8


def test_the_tilde_of_a_named_user_is_that_users_home_folder(tmp_path):
    text = replaced("/var/lib/vodpoller/events.jsonl", "~root/events.jsonl")
    found: Any = load(text, tmp_path).sinks["archive"]
    assert found.path == str(Path("~root/events.jsonl").expanduser())


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("images", "sinks.images.path"),
        ("cwd", "sinks.script.cwd"),
        ("secret", "sinks.hook.secret_file"),
        ("journal", "journal.path"),
        ("key", "credentials.secret_id_file"),
    ],
)
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("$HOME/x", 'has a "$" without a variable (write ${HOME};'),
        ("/srv/$${x/$1", 'has a "$" without a variable (write ${NAME};'),
        ("/srv/x$", 'has a "$" without a variable (write ${NAME};'),
        ("~no-such-user/x", 'begins with a ~, but the user "no-such-user" does not exist (write'),
    ],
)
def test_a_dollar_or_tilde_that_means_nothing_in_a_path_is_an_error(key, place, path, words, tmp_path):
    (tmp_path / "there").write_text(WEBHOOK_SECRET)
    there = {name: str(tmp_path / "there") for name in ("key", "secret")}
    found = problems_of(with_paths(**{**there, key: path}), tmp_path)
    wanted = [problem for problem in found if problem.startswith(f"{place}: ")]
    assert [problem.startswith(f"{place}: {words}") for problem in wanted] == [True]
    others = [problem for problem in found if problem not in wanted]
    assert not others or (key == "key" and len(others) == 1)  # this path is used for both parts of the key


def test_a_variables_value_may_hold_a_dollar(tmp_path):
    text = replaced("/var/lib/vodpoller/events.jsonl", "/srv/${ODD}/$${x}.jsonl")
    found: Any = load(text, tmp_path, {**ENV, "ODD": "a$b"}).sinks["archive"]
    assert found.path == "/srv/a$b/${x}.jsonl"


# --- the lease


@pytest.mark.parametrize(
    ("endpoint", "secs", "warned"),
    [
        ("https://vod.tencentcloudapi.com", 60, True),
        ("https://vod.intl.tencentcloudapi.com", 30.1, True),
        ("https://vod.example", 31, True),
        ("https://vod.example", 30, False),
        ("https://vod.tencentcloudapi.com", 20, False),
        ("http://127.0.0.1:9", 60, False),
    ],
)
def test_a_lease_longer_than_vods_is_a_warning_except_for_a_simulator(endpoint, secs, warned, tmp_path):
    found = load(VALID + f'[api]\nendpoint = "{endpoint}"\nlease_secs = {secs}', tmp_path)
    assert [warning.startswith("api.lease_secs: ") for warning in found.warnings] == [True] * warned


# --- secrets that the service cannot read


@pytest.fixture
def units(tmp_path, monkeypatch):
    monkeypatch.setattr(permissions, "UNITS", tmp_path / "units")
    (tmp_path / "units" / "vodpoller.service.d").mkdir(parents=True)
    return tmp_path / "units"


HOOK = """
[sinks.hook]
type = "webhook"
url = "https://app.example"
secret_file = "{name}"
"""


def warnings_of_root(name: str, folder: Path, mode: int, monkeypatch, *, uid: int = 0, **env: str) -> tuple[str, ...]:
    (folder / "hook_secret").write_text(WEBHOOK_SECRET)
    (folder / "hook_secret").chmod(mode)
    monkeypatch.setattr("os.geteuid", lambda: uid)
    text = replaced('sinks = ["archive"]', 'sinks = ["archive", "hook"]') + HOOK.format(name=name)
    (folder / "config.toml").write_text(text)
    return config.load(folder / "config.toml", env={**ENV, **env}, for_unit=True).warnings


needs_root = pytest.mark.skipif("os.getuid() != 0", reason="only root can create files that root owns")


@needs_root
@pytest.mark.parametrize("mode", [0o600, 0o640])
@pytest.mark.parametrize("kind", ["beside", "absolute", "directory"])
def test_root_is_warned_of_a_secret_that_only_root_can_read(kind, mode, units, tmp_path, monkeypatch):
    path = tmp_path / "hook_secret"
    env = {"CREDENTIALS_DIRECTORY": str(tmp_path)} if kind == "directory" else {}
    name = str(path) if kind == "absolute" else "hook_secret"
    (warning,) = warnings_of_root(name, tmp_path, mode, monkeypatch, **env)
    assert warning.startswith(f"sinks.hook.secret_file: only root can read {path}")
    assert f"LoadCredential=hook_secret:{path}" in warning
    assert ('secret_file = "hook_secret" here' in warning) == (kind == "absolute")


@needs_root
@pytest.mark.parametrize(("mode", "uid"), [(0o644, 0), (0o600, 1000)])
def test_a_secret_that_others_can_read_too_is_not_a_warning(mode, uid, units, tmp_path, monkeypatch):
    assert warnings_of_root("hook_secret", tmp_path, mode, monkeypatch, uid=uid) == ()


@needs_root
@pytest.mark.parametrize("name", ["vodpoller.service", "vodpoller@.service", "vodpoller@live.service"])
@pytest.mark.parametrize("part", ["", ".d/override.conf"])
def test_a_secret_that_the_unit_loads_is_not_a_warning(name, part, units, tmp_path, monkeypatch):
    unit = f"{name}{part}"
    (units / unit).parent.mkdir(exist_ok=True)
    (units / unit).write_text("[Service]\nLoadCredential=hook_secret:/etc/vodpoller/hook_secret\n")
    assert warnings_of_root("hook_secret", tmp_path, 0o600, monkeypatch) == ()
    assert len(warnings_of_root(str(tmp_path / "hook_secret"), tmp_path, 0o600, monkeypatch)) == 1


# --- where the key comes from


def test_the_origin_of_each_part_of_the_key_is_recorded(tmp_path):
    (tmp_path / "secret_id").write_text("id-from-a-file")
    assert load(VALID, tmp_path).credentials.origins == {
        "secret_id": "$TENCENTCLOUD_SECRET_ID",
        "secret_key": "$TENCENTCLOUD_SECRET_KEY",
    }
    here = '[credentials]\nsecret_id_file = "secret_id"\nsecret_key = "${TENCENTCLOUD_SECRET_KEY}"'
    assert load(VALID + here, tmp_path).credentials.origins == {
        "secret_id": str(tmp_path / "secret_id"),
        "secret_key": "the configuration",
    }
    env = {**ENV, "CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load(VALID, tmp_path, env).credentials.origins == {
        "secret_id": f"$CREDENTIALS_DIRECTORY/secret_id ({tmp_path / 'secret_id'})",
        "secret_key": "$TENCENTCLOUD_SECRET_KEY",
    }


# --- one mistake at a time: the text, the key that the one problem begins with, and words that it must contain


@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        # keys that do not exist
        (
            VALID + "[api]\ntimout_secs = 3",
            "api.timout_secs",
            ["this key does not exist", "did you mean timeout_secs?"],
        ),
        (VALID + "[lok]\nlevel = 'info'", "lok", ["this key does not exist", "did you mean log?"]),
        (VALID + "[log]\nzzz = 1", "log.zzz", ["this key does not exist", "level, format"]),
        ("level = 'info'" + VALID, "level", ["this key does not exist here", "[log]"]),
        (VALID + "[log]\nmax_concurrent_pulls = 3", "log.max_concurrent_pulls", ["[[sources]]"]),
        (
            replaced('name = "main"', 'name = "main"\nmax_lanes = 3'),
            "sources.main.max_lanes",
            ["is now called max_concurrent_pulls"],
        ),
        (VALID + "paht = 'x'", "sinks.archive.paht", ["did you mean path?"]),
        # types
        (
            replaced('name = "main"', 'name = "main"\nmax_concurrent_pulls = true'),
            "sources.main.max_concurrent_pulls",
            ["whole number"],
        ),
        (
            replaced('name = "main"', 'name = "main"\nmax_concurrent_pulls = 1.5'),
            "sources.main.max_concurrent_pulls",
            ["fraction"],
        ),
        (
            replaced('name = "main"', 'name = "main"\ninterval_secs = "1"'),
            "sources.main.interval_secs",
            ["must be a number without quotes, but is text (for example: interval_secs = 1)"],
        ),
        (replaced('name = "main"', 'name = "main"\nlong_poll = 1'), "sources.main.long_poll", ["true or false"]),
        (replaced('name = "main"', "name = 5"), "sources[0].name", ["must be text in quotes, but is a whole number"]),
        (replaced('["archive"]', '"archive"'), "routes.all.sinks", ["must be a list in square brackets, but is text"]),
        (replaced('["archive"]', '["archive", 5]'), "routes.all.sinks[1]", ["must be text in quotes"]),
        (VALID + "[log]\nlevel = 3", "log.level", ['one of "debug", "info", "warning", "error"']),
        (VALID + "[daemon]\nshutdown_secs = 2020-01-01", "daemon.shutdown_secs", ["but is a date or time"]),
        ("log = 'info'" + VALID, "log", ["must be a table, but is text", "[log]"]),
        ("credentials = 'x'" + VALID, "credentials", ["must be a table"]),
        (VALID.replace(SOURCE, '[sources]\nname = "main"\n'), "sources", ["must be a list of tables", "[[sources]]"]),
        ("sources = [1]" + VALID.replace(SOURCE, ""), "sources[0]", ["must be a table", "[[sources]]"]),
        ("sinks = 1" + ROUTE + SOURCE, "sinks", ["must hold tables"]),
        (replaced('type = "file"', "type = 1"), "sinks.archive.type", ["must be text", 'one of "download"']),
        # numbers
        (
            replaced('name = "main"', 'name = "main"\nmax_concurrent_pulls = -1'),
            "sources.main.max_concurrent_pulls",
            ["at least 1", "128"],
        ),
        (
            replaced('name = "main"', 'name = "main"\nmax_concurrent_pulls = 129'),
            "sources.main.max_concurrent_pulls",
            ["at most 128"],
        ),
        (replaced('name = "main"', 'name = "main"\nsub_app_id = 0'), "sources.main.sub_app_id", ["0 is too small"]),
        (VALID + "[api]\nrequests_per_sec = inf", "api.requests_per_sec", ["inf is not a number that can be used"]),
        (VALID + "[api]\nlease_secs = nan", "api.lease_secs", ["nan is not"]),
        (VALID + "[journal]\nmax_bytes = 1", "journal.max_bytes", ["at least 1048576"]),
        (VALID + "[journal]\nledger_days = 3", "journal.ledger_days", ["at least 4"]),
        (VALID + "[api]\nconfirm_timeout_secs = 0", "api.confirm_timeout_secs", ["0 is too small (more than 0"]),
        (VALID + "queue_max_events = -5", "sinks.archive.queue_max_events", ["-5 is too small (at least 16"]),
        (
            VALID + "[api]\nconfirm_reserve_secs = 30",
            "api.confirm_reserve_secs",
            ["30 is not less than lease_secs", "less than 30"],
        ),
        (VALID + "[api]\nconfirm_timeout_secs = 6", "api.confirm_timeout_secs", ["more than confirm_reserve_secs"]),
        # values from a fixed list
        (
            VALID + '[log]\nlevel = "warn"',
            "log.level",
            ['"warn" is not known (did you mean "warning"?', '"debug", "info", "warning", "error"'],
        ),
        (replaced('"dead_letter"', '"dead-letter"'), "sources.main.unrouted", ['did you mean "dead_letter"?']),
        (replaced('"/var/lib', '"x"\nformat = "callbak"\n#'), "sinks.archive.format", ['"callback"']),
        # names
        (replaced('name = "all"', 'name = "all of it"'), "routes[0].name", ['letters, digits, ".", "_" and "-"']),
        (replaced('name = "main"', ""), "sources[0].name", ['is missing (for example: name = "main")']),
        (replaced('name = "all"', f'name = "{"a" * 65}"'), f"routes.{'a' * 65}.name", ["at most 64"]),
        (VALID.replace("archive", '"a b"').replace('""a b""', '"a b"'), "sinks.a b", ["not a valid name for a sink"]),
        # missing tables
        (ROUTE + SINK, "sources", ["there is none", "[[sources]]"]),
        (SOURCE + SINK, "routes", ["there is none", "[[routes]]"]),
        ("sources = []" + ROUTE + SINK, "sources", ["there is none"]),
        # the endpoint
        (VALID + '[api]\nendpoint = "vod.example"', "api.endpoint", ["is not an http or https address"]),
        (VALID + '[api]\nendpoint = "https://x:y"', "api.endpoint", ["is not an http or https address"]),
        (VALID + '[api]\nendpoint = "https://[::1"', "api.endpoint", ["is not an http or https address"]),
        (VALID + '[api]\nendpoint = "ftp://vod.example"', "api.endpoint", ["is not an http or https address"]),
        (VALID + '[api]\nendpoint = "https://vod.example/v3"', "api.endpoint", ["more than scheme, host and port"]),
        (VALID + '[api]\nendpoint = "https://vod.example?a=b"', "api.endpoint", ["more than scheme, host and port"]),
        (VALID + '[api]\nendpoint = "https://u:p@vod.example"', "api.endpoint", ["more than scheme, host and port"]),
        (VALID + '[api]\nendpoint = "http://vod.example"', "api.endpoint", ["is not encrypted (write https://"]),
        (VALID + '[api]\nregion = ""', "api.region", ["characters"]),
        # references
        (
            replaced('["archive"]', '["archive", "archvie"]'),
            "routes.all.sinks",
            ['the sink "archvie" does not exist (did you mean "archive"?', 'there are: "archive"'],
        ),
        (replaced('["archive"]', '["archive"]\nsources = ["mian"]'), "routes.all.sources", ['did you mean "main"?']),
        (replaced('["archive"]', '["archive"]\nsources = []'), "routes.all.sources", ["is empty"]),
        (VALID + '[sinks.spare]\ntype = "stdout"', "sinks.spare", ["no route uses this sink"]),
        # sink types
        (replaced('type = "file"', 'type = "flie"'), "sinks.archive.type", ['did you mean "file"?', '"webhook"']),
        (replaced('type = "file"', ""), "sinks.archive.type", ["is missing", '"file"', '"stdout"', '"webhook"']),
        (SOURCE + ROUTE + '[sinks.archive]\ntype = "file"', "sinks.archive.path", ["is missing"]),
        (SOURCE + ROUTE + '[sinks.archive]\ntype = "webhook"', "sinks.archive.url", ["is missing (for example: url ="]),
        (
            SOURCE + ROUTE + '[sinks.archive]\ntype = "webhook"\nurl = "http://x/"\nbody = """\n{a: b,\n c 7}"""',
            "sinks.archive.body",
            ['" c 7}" is not a JMESPath expression: line 2, column 4: "7" is not valid here'],
        ),
        (
            SOURCE + ROUTE + '[sinks.archive]\ntype = "webhook"\nurl_file = "nowhere"',
            "sinks.archive.url_file",
            ["nowhere cannot be read: No such file"],
        ),
        # routes
        (replaced('["archive"]', '["archive"]\nevent_types = []'), "routes.all.event_types", ["is empty"]),
        (replaced('["archive"]', '["archive"]\nevent_types = [""]'), "routes.all.event_types", ["an empty pattern"]),
        (replaced('["archive"]', '["archive"]\nevent_types = ["a[b"]'), "routes.all.event_types", ['"a[b"', '"]"']),
        (replaced('["archive"]', '["archive"]\nevent_types = ["a[]b"]'), "routes.all.event_types", ['"a[]b"']),
        (replaced('["archive"]', '["archive"]\nevent_types = ["[!]"]'), "routes.all.event_types", ['"[!]"']),
        (
            replaced('["archive"]', '["archive"]\nwhere = "Definition == 10"'),
            "routes.all.where",
            ['"Definition == 10" is not a JMESPath expression: column 15: "10" is not valid here', "`10`"],
        ),
        (replaced('["archive"]', '["archive"]\nwhere = "a =="'), "routes.all.where", ["column 5: it ends too early"]),
        (replaced('["archive"]', '["archive"]\nwhere = "a == \'b"'), "routes.all.where", ["unclosed ' delimiter"]),
        (replaced('["archive"]', '["archive"]\nwhere = ""'), "routes.all.where", ["is empty"]),
        (
            replaced('["archive"]', '["archive"]\nwhere = "a || !contians(b, \'c\')"'),
            "routes.all.where",
            ["JMESPath has no function contians", 'did you mean "contains"?'],
        ),
        (replaced(ROUTE, ROUTE + ROUTE), "routes.all.name", ["another of the routes has this name"]),
        # sources
        (
            replaced(SOURCE, SOURCE + SOURCE + "sub_app_id = 7"),
            "sources.main.name",
            ["another of the sources has this name"],
        ),
        (
            replaced(SOURCE, SOURCE + SOURCE.replace("main", "other")),
            "sources.other.sub_app_id",
            ["neither this source nor sources.main has one"],
        ),
        (
            replaced(SOURCE, SOURCE + "sub_app_id = 7" + SOURCE.replace("main", "other") + "sub_app_id = 7"),
            "sources.other.sub_app_id",
            ["this is also that of sources.main"],
        ),
        # variables
        (VALID + '[log]\nlevel = "${LEVEL}"', "log.level", ["no variable LEVEL", "$${"]),
        (VALID + '[log]\nlevel = "${LEVEL"', "log.level", ["without a variable"]),
        (VALID + '[log]\nlevel = "${LEVEL:-info}"', "log.level", ["without a variable"]),
        (replaced('["archive"]', '["${SINK}", "archive"]'), "routes.all.sinks[0]", ["no variable SINK"]),
        (replaced('"file"', '"${TYPE}"'), "sinks.archive.type", ["no variable TYPE"]),
        # files
        (VALID + '[journal]\npath = ""', "journal.path", ["names no file"]),
        (VALID + '[journal]\npath = "/a\\u0000b"', "journal.path", ["names no file"]),
        (VALID + '[journal]\npath = ":memory:"', "journal.path", ["not the path of a file", "journal.db"]),
        (VALID + '[journal]\npath = "./:memory:"', "journal.path", ["not the path of a file"]),
        (VALID + '[journal]\npath = "file:x?mode=memory"', "journal.path", ["not the path of a file", "URI"]),
        (VALID + '[journal]\npath = "FILE:///tmp/x.db"', "journal.path", ["not the path of a file"]),
        (
            VALID + '[journal]\npath = "/var/lib/vodpoller/events.jsonl"',
            "sinks.archive",
            ["journal writes", "/var/lib/vodpoller/events.jsonl", "too"],
        ),
        (
            replaced('"file"', '"sqlite"') + '[journal]\npath = "/var/lib/vodpoller/events.jsonl"',
            "sinks.archive",
            ["journal writes", "/var/lib/vodpoller/events.jsonl", "too (give each its own)"],
        ),
        (
            replaced('["archive"]', '["b", "archive"]')
            + SINK.replace("archive", "b").replace('"file"', '"sqlite"').replace("lib/", "lib/../lib/"),
            "sinks.b",
            ["sinks.archive writes", "/var/lib/vodpoller/events.jsonl", "too (give each its own)"],
        ),
        (
            replaced('["archive"]', '["archive", "b"]') + SINK.replace("archive", "b"),
            "sinks.b",
            ["sinks.archive writes", "/var/lib/vodpoller/events.jsonl", "too (give each its own)"],
        ),
    ],
)
def test_a_mistake_is_one_problem_that_names_its_key_and_a_remedy(tmp_path, text, key, words):
    (problem,) = problems_of(text, tmp_path)
    assert problem.startswith(f"{key}: ")
    for word in words:
        assert word in problem
    assert problem.endswith(")")


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("a = ", "line 1, column 5: this is not a value (write text in quotes"),
        ("\n[log]\nlevel = debug", "line 3, column 9: this is not a value"),
        ('[log]\nlevel = "info\nformat = 1', "line 2, column 14: a text is not closed on its line"),
        ("[log]\n[log]\n", "line 2, column 5: this table begins for the second time"),
        ("a = 1\na = 2\n", "line 2, column 6: a key is given twice"),
        ("a 1", "line 1, column 3: a key has no ="),
        ("a = 1 b = 2", "line 1, column 7: there is more text after the value"),
        ("[log", "line 1, column 5: the name of a table is not closed"),
        ("a = 'x", "line 1, column 7: a text is not closed"),
        ("a = '''x", "line 1, column 9: "),
        (f"a = {'1' * 5000}", "this is not TOML"),
    ],
)
def test_text_that_is_not_toml_is_one_problem_with_line_and_column(tmp_path, text, start):
    (problem,) = problems_of(text, tmp_path)
    assert problem.startswith(start)


def test_text_that_is_too_deep_for_the_parser_is_one_problem(tmp_path):
    gc.collect()  # else objects of other tests may be finalized, and fail, at the recursion limit that it reaches
    (problem,) = problems_of(f"a = {'[' * 5000}", tmp_path)
    assert problem.startswith("this is not TOML")


def test_the_error_of_a_missing_file_names_the_file_to_copy(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: the file does not exist \(copy config\.example\.toml"):
        config.load(tmp_path / "none.toml", env=ENV)


def test_a_folder_in_the_files_place_is_a_problem(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory \("):
        config.load(tmp_path, env=ENV)


def test_a_file_in_another_encoding_is_a_problem_with_its_line(tmp_path):
    (tmp_path / "config.toml").write_bytes("[log]\n# für\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.toml: line 2: this is not UTF-8 text"):
        config.load(tmp_path / "config.toml", env=ENV)


def test_everything_wrong_is_reported_at_once(tmp_path):
    text = """
        level = "info"
        [api]
        endpont = "https://vod.example"
        requests_per_sec = -1
        [credentials]
        secret_id_file = "none"
        [[sources]]
        name = "main"
        max_concurrent_pulls = "16"
        [[sources]]
        interval_secs = 0
        [[routes]]
        name = "r"
        event_types = ["a["]
        where = "a =="
        sinks = ["archiv", "${SINK}"]
        [sinks.archive]
        type = "fil"
        [sinks.hook]
        type = "webhook"
        url = 5
        [journal]
        ledger_days = 0
        [log]
        level = "loud"
        [daemon]
        shutdown_secs = true
        """
    keys = [problem.split(": ")[0] for problem in problems_of(text, tmp_path, {})]
    assert sorted(keys) == sorted(
        [
            "level",
            "api.endpont",
            "api.requests_per_sec",
            "credentials.secret_id_file",
            "credentials.secret_key",
            "sources.main.max_concurrent_pulls",
            "sources.main.unrouted",
            "sources[1].name",
            "sources[1].interval_secs",
            "sources[1].sub_app_id",
            "sources[1].unrouted",
            "routes.r.event_types",
            "routes.r.where",
            "routes.r.sinks",
            "routes.r.sinks[1]",
            "sinks.archive",
            "sinks.archive.type",
            "sinks.hook",
            "sinks.hook.url",
            "journal.ledger_days",
            "log.level",
            "daemon.shutdown_secs",
        ]
    )


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["main", "archive", "${X", "["]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=5), values, max_size=3),
    max_leaves=5,
)
PLACES = [
    (table, key)
    for table in [
        ("sources", 0),
        ("routes", 0),
        ("sinks", "archive"),
        ("api",),
        ("credentials",),
        ("journal",),
        ("log",),
    ]
    for key in [
        None,
        "name",
        "sinks",
        "sources",
        "where",
        "event_types",
        "type",
        "path",
        "secret_key",
        "endpoint",
        "level",
    ]
]


@given(place=st.sampled_from(PLACES), value=ANYTHING)
def test_any_value_in_the_file_is_accepted_or_a_problem(place, value):
    data = tomllib.loads(VALID + "[api]\n[credentials]\n[journal]\n[log]")
    (*path, last), key = place
    at: Any = data
    for part in path:
        at = at[part]
    if key is None:
        at[last] = value
    else:
        at[last][key] = value
    try:
        found = config.from_dict(data, where="file", base=Path("/nonexistent"), env=ENV).sources
    except ConfigError as error:
        found = error.problems
    assert found


# --- coverage


@pytest.mark.parametrize(
    ("keys", "covered"),
    [
        ("", True),
        ('event_types = ["*"]', True),
        ('event_types = ["a", "**"]', True),
        ('sources = ["main"]', True),
        ('event_types = ["?*"]', False),
        ('event_types = ["New*", "[!N]*"]', False),
        ('where = "EventType"', False),
        ('sources = ["other"]', False),
    ],
)
def test_a_source_needs_unrouted_if_some_events_match_no_route(tmp_path, keys, covered):
    route = ROUTE + keys + '\n[[routes]]\nname = "b"\nsources = ["other"]\nsinks = ["archive"]\n'
    other = '[[sources]]\nname = "other"\nsub_app_id = 7\n'
    text = SOURCE + other + route + SINK
    assert load(text, tmp_path).coverage == {"main": covered, "other": True}
    text = text.replace('unrouted = "dead_letter"', "")
    if covered:
        assert load(text, tmp_path).sources[0].unrouted is None
    else:
        (problem,) = problems_of(text, tmp_path)
        assert problem.startswith("sources.main.unrouted: is missing")
        assert all(word in problem for word in ('"dead_letter"', '"confirm"', '"leave"'))


# --- sinks of other packages


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("vodpoller_no_such_module:Sink", ["cannot be loaded: ModuleNotFoundError", "vodpoller_no_such_module"]),
        ("vodpoller.config.load:NoSuchName", ["cannot be loaded: AttributeError"]),
        (f"{__name__}:NoSink", ["is not a sink"]),
        ("vodpoller.sinks:Sink", ["is not a sink"]),
    ],
)
def test_an_unusable_installed_sink_type_is_a_problem_with_its_reason(tmp_path, monkeypatch, value, words):
    point = EntryPoint(name="odd", value=value, group="vodpoller.sinks")
    monkeypatch.setattr(validation, "available_sinks", lambda: {**available_sinks(), "odd": point})
    (problem,) = problems_of(SOURCE + ROUTE + '[sinks.archive]\ntype = "odd"', tmp_path)
    assert problem.startswith('sinks.archive.type: the sink type "odd" ')
    assert all(word in problem for word in words)


def test_two_sinks_may_have_tables_in_one_database(tmp_path):
    rows = SINK.replace('"file"', '"sqlite"')
    text = replaced(SINK, rows + rows.replace("archive", "b")).replace('["archive"]', '["archive", "b"]')
    loaded = load(text, tmp_path)
    assert loaded.sinks["b"].claims() == frozenset()
    assert files_of_sinks(loaded) == [Path("/var/lib/vodpoller/events.jsonl")]


def test_a_sink_type_that_is_not_configured_is_not_loaded(tmp_path, monkeypatch):
    point = EntryPoint(name="odd", value="vodpoller_no_such_module:Sink", group="vodpoller.sinks")
    monkeypatch.setattr(validation, "available_sinks", lambda: {**available_sinks(), "odd": point})
    assert set(load(VALID, tmp_path).sinks) == {"archive"}


# --- variables


def test_variables_are_replaced_in_texts_only_and_can_be_escaped(tmp_path):
    env = {**ENV, "FOLDER": "/srv", "TYPE": "New${X}*", "EMPTY": ""}
    text = VALID.replace("/var/lib", "${FOLDER}${EMPTY}").replace(
        '["archive"]', '["archive"]\nevent_types = ["$${FOLDER}", "$$", "$x", "${TYPE}"]'
    )
    loaded = load(text + "\n# ${COMMENT}", tmp_path, env)
    assert loaded.routes[0].event_types == ("${FOLDER}", "$$", "$x", "New${X}*")
    assert loaded.sinks["archive"].claims() == frozenset({"file:/srv/vodpoller/events.jsonl"})


# --- the API key


def key_of(loaded: Config) -> tuple[str, str, str | None]:
    found = loaded.credentials
    return found.secret_id.get(), found.secret_key.get(), found.token.get() if found.token else None


def test_a_missing_key_is_a_problem_that_names_the_three_places(tmp_path):
    problems = problems_of(VALID, tmp_path, {})
    assert [problem.split(": ")[0] for problem in problems] == ["credentials.secret_id", "credentials.secret_key"]
    for way in ("secret_id_file", "$CREDENTIALS_DIRECTORY/secret_id", "TENCENTCLOUD_SECRET_ID"):
        assert way in problems[0]


def test_a_key_missing_in_the_file_comes_from_the_environment(tmp_path):
    assert key_of(load(VALID, tmp_path)) == ("AKIDfromenv", "keyfromenv", None)
    loaded = load(VALID, tmp_path, {**ENV, "TENCENTCLOUD_TOKEN": "tokenfromenv"})
    assert key_of(loaded) == ("AKIDfromenv", "keyfromenv", "tokenfromenv")


CVM_ROLE = '[credentials]\nprovider = "cvm_role"\n'
ASSUME_ROLE = '[credentials]\nprovider = "assume_role"\nrole_arn = "qcs::cam::uin/1:roleName/r"\n'


@pytest.mark.parametrize(
    ("table", "key", "words"),
    [
        (CVM_ROLE + 'secret_id = "a-secret-id"', "secret_id", '"static" or "assume_role", but provider is "cvm_role"'),
        (CVM_ROLE + 'secret_key_file = "gone"', "secret_key_file", '"static" or "assume_role"'),
        (CVM_ROLE + "duration_secs = 7200", "duration_secs", 'provider = "assume_role"'),
        (ASSUME_ROLE + 'role = "r"', "role", 'provider = "cvm_role", but provider is "assume_role"'),
        ('[credentials]\nrole_arn = "qcs::cam::uin/1:roleName/r"', "role_arn", 'provider is "static"'),
        ('[credentials]\nmetadata_endpoint = "http://m"', "metadata_endpoint", 'provider = "cvm_role"'),
        ('[credentials]\nprovider = "cvm_roll"', "provider", 'did you mean "cvm_role"?'),
        ("[credentials]\nprovider = 5", "provider", "is a whole number"),
        (CVM_ROLE + 'role = "a/b"', "role", "characters that do not belong here"),
        (CVM_ROLE + 'metadata_endpoint = "http://m/latest"', "metadata_endpoint", "more than scheme, host and port"),
        (CVM_ROLE + 'rolle = "r"', "rolle", "did you mean role?"),
        ('[credentials]\nprovider = "assume_role"', "role_arn", "TENCENTCLOUD_ROLE_ARN"),
        ('[credentials]\nprovider = "assume_role"\nrole_arn = "r"', "role_arn", "for example"),
        (ASSUME_ROLE + "duration_secs = 899", "duration_secs", "at least 900"),
        (ASSUME_ROLE + "duration_secs = 43201", "duration_secs", "at most 43200"),
        (ASSUME_ROLE + 'sts_endpoint = "http://sts.example"', "sts_endpoint", "is not encrypted"),
    ],
)
def test_a_key_that_does_not_fit_the_provider_is_a_problem(tmp_path, table, key, words):
    (problem,) = problems_of(VALID + table, tmp_path)
    assert problem.startswith(f"credentials.{key}: ")
    assert words in problem
    assert "a-secret-id" not in problem


def test_an_assumed_role_needs_a_permanent_key(tmp_path):
    problems = problems_of(VALID + ASSUME_ROLE, tmp_path, {})
    assert [problem.split(": ")[0] for problem in problems] == ["credentials.secret_id", "credentials.secret_key"]


def test_the_role_of_a_machine_neither_needs_nor_reads_a_key(tmp_path):
    loaded = load(VALID + CVM_ROLE, tmp_path, {})
    assert loaded.role == CvmRole(role="", metadata_endpoint="http://metadata.tencentyun.com")
    assert loaded.all_warnings() == list(loaded.warnings)
    assert load(VALID + CVM_ROLE, tmp_path).credentials.secret_key.get() == ""


def test_an_assumed_role_may_be_named_by_the_environment(tmp_path):
    variables = {"TENCENTCLOUD_ROLE_ARN": "qcs::cam::uin/2:roleName/e", "TENCENTCLOUD_ROLE_SESSION_NAME": "env"}
    text = VALID + '[credentials]\nprovider = "assume_role"\n'
    role = load(text, tmp_path, {**ENV, **variables}).role
    assert (role.role_arn, role.role_session_name) == ("qcs::cam::uin/2:roleName/e", "env")
    role = load(VALID + ASSUME_ROLE, tmp_path, {**ENV, **variables}).role
    assert role.role_arn == "qcs::cam::uin/1:roleName/r"


def test_commands_that_do_not_call_vod_need_neither_key_nor_role(tmp_path):
    text = VALID + '[credentials]\nprovider = "assume_role"\n'
    (tmp_path / "config.toml").write_text(text)
    loaded = config.load(tmp_path / "config.toml", env={}, needs_key=False)
    assert loaded.sources
    assert loaded.role is None  # otherwise a key of the role would be requested
    (tmp_path / "config.toml").write_text(VALID + ASSUME_ROLE)
    assert config.load(tmp_path / "config.toml", env={}, needs_key=False).role is None
    (tmp_path / "config.toml").write_text(text)
    loaded = config.load(tmp_path / "config.toml", env=ENV, needs_key=False)
    assert (loaded.role, loaded.credentials().secret_id) == (None, "")  # the permanent key is not used in its place


def test_a_reload_keeps_the_temporary_key_of_the_same_role_only(tmp_path):
    former, same, other = (load(VALID + text, tmp_path) for text in (CVM_ROLE, CVM_ROLE, ASSUME_ROLE))
    key = IssuedKey(credentials=Credentials("tmp-id", "tmp-key", "tmp-token"), role="r", life_secs=9, ends_at=9)
    former.issued.take(key)
    assert same.keeping(former).issued.in_use is key
    assert other.keeping(former).issued.in_use is None
    assert former.issued.in_use is key
    assert {"tmp-id", "tmp-key", "tmp-token"} <= set(other.keeping(former).hidden())


def test_key_and_token_come_from_the_credentials_directory_first(tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "secret_id").write_text("AKIDfromdir\n")
    (folder / "secret_key").write_text("keyfromdir\r\n\n")
    env = {**ENV, "TENCENTCLOUD_TOKEN": "of another key", "CREDENTIALS_DIRECTORY": str(folder)}
    assert key_of(load(VALID, tmp_path, env)) == ("AKIDfromdir", "keyfromdir", None)
    (folder / "token").write_text("tokenfromdir")
    assert key_of(load(VALID, tmp_path, env)) == ("AKIDfromdir", "keyfromdir", "tokenfromdir")


def test_a_relative_secret_file_may_be_in_either_of_two_folders(tmp_path):
    folder = tmp_path / "credentials"
    folder.mkdir()
    (folder / "id").write_text("AKIDfromdir")
    (tmp_path / "id").write_text("AKIDfrombeside")
    (tmp_path / "key").write_text("keyfromfile")
    text = f'{VALID}[credentials]\nsecret_id_file = "id"\nsecret_key_file = "{tmp_path}/key"'
    assert key_of(load(text, tmp_path)) == ("AKIDfrombeside", "keyfromfile", None)
    env = {"CREDENTIALS_DIRECTORY": str(folder)}
    assert key_of(load(text, tmp_path, env)) == ("AKIDfromdir", "keyfromfile", None)


def test_an_unreadable_credentials_directory_is_a_problem(tmp_path, monkeypatch):
    def refuse(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    folder = tmp_path / "credentials"
    path = tmp_path / "config.toml"
    path.write_text(VALID)
    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(ConfigError, match=f"credentials.secret_id_file: {folder}/secret_id cannot be read: "):
        config.load(path, env={**ENV, "CREDENTIALS_DIRECTORY": str(folder)})


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file or directory"),
        ("folder", "Is a directory"),
        (b"", "it is empty"),
        (b"\r\n\n", "it is empty"),
        (b"\xffhunter2", "it is not UTF-8 text"),
    ],
)
def test_a_secret_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, content, why):
    file = tmp_path / "key"
    match content:
        case "folder":
            file.mkdir()
        case bytes():
            file.write_bytes(content)
    (problem,) = problems_of(VALID + '[credentials]\nsecret_key_file = "key"', tmp_path)
    assert problem.startswith(f"credentials.secret_key_file: {file} cannot be read: {why} (")


@pytest.mark.parametrize(
    ("keys", "key", "words"),
    [
        ('secret_key = "hunter2"\nsecret_key_file = "key"', "credentials.secret_key_file", "together with secret_key"),
        ('secret_key = ""', "credentials.secret_key", "is empty"),
        ('secret_key_file = ""', "credentials.secret_key_file", "is empty"),
        ('secret_key_file = "a\\u0000b"', "credentials.secret_key_file", "a file cannot have such a name"),
        ("secret_key_file = 5", "credentials.secret_key_file", "must be text in quotes"),
        ("secret_key = 18446744073", "credentials.secret_key", "must be text in quotes"),
        ('secret_key = ["hunter2"]', "credentials.secret_key", "must be text in quotes"),
        ('secret_keyy = "hunter2"', "credentials.secret_keyy", "did you mean secret_key?"),
        ('secret_key = "hunter2${NONE}"', "credentials.secret_key", "no variable NONE"),
    ],
)
def test_a_wrong_secret_is_a_problem_that_does_not_show_it(tmp_path, keys, key, words):
    (problem,) = problems_of(f"{VALID}[credentials]\n{keys}", tmp_path)
    assert problem.startswith(f"{key}: ")
    assert words in problem
    assert "hunter2" not in problem
    assert "18446744073" not in problem


def test_messages_and_the_configurations_repr_hold_no_secrets(tmp_path):
    text = VALID + '[credentials]\nsecret_id = "hunter2"\nsecret_key = "${KEY}"\ntoken = "hunter2"\n'
    env = {"KEY": "hunter2"}
    assert "hunter2" not in repr(load(text, tmp_path, env))
    broken = (
        text + '[sinks.hook]\ntype = "webhook"\nurl = 5\nsecret = "hunter2"\nheaders = "hunter2"\n[log]\nlevel = 1\n'
    )
    problems = problems_of(broken, tmp_path, env)
    assert len(problems) >= 4
    assert "hunter2" not in "".join(problems)


def test_all_secrets_can_be_listed_for_redaction_and_rereading(tmp_path):
    (tmp_path / "hook").write_text(WEBHOOK_SECRET + "\n")
    text = VALID.replace('["archive"]', '["archive", "hook"]') + (
        '[sinks.hook]\ntype = "webhook"\nurl = "https://app.example/x"\nsecret_file = "hook"'
    )
    values = [secret.get() for secret in load(text, tmp_path).secrets()]
    assert values == ["AKIDfromenv", "keyfromenv", WEBHOOK_SECRET]


def test_a_secret_keeps_its_last_value_if_its_file_is_unusable(tmp_path):
    file = tmp_path / "key"
    file.write_text("one\n")
    secret = Secret(path=file)
    file.write_text("two\n")
    secret.reread()
    assert secret.get() == "two"
    file.write_text("\n")
    with pytest.raises(OSError, match="it is empty"):
        secret.reread()
    file.unlink()
    with pytest.raises(FileNotFoundError):
        secret.reread()
    assert secret.get() == "two"
    assert "two" not in f"{secret} {secret!r}"


UNFIT_KEYS = [
    ("hunter2 ", "a blank at character 8 of 8"),
    (" hunter2", "a blank at character 1 of 8"),
    ("hun ter2", "a blank at character 4"),
    ("hunter2\t", "a tab at character 8"),
    ('"hunter2"', "a quote at character 1"),
    ("'hunter2'", "a quote at character 1"),
    ("\ufeffhunter2", "byte order mark"),
    ("hunter2\u00a0", "no-break space (U+00A0) at character 8"),
    ("hun\u200bter2", "zero width space (U+200B) at character 4"),
    ("hunter\uff12", "fullwidth digit two (U+FF12)"),
    ("hunter2\x1b[0m", "a control character (U+001B) at character 8"),
    ("hunter2\nhunter3", "2 lines"),
    ("hunter2\r\n\r\nhunter3\nhunter4", "3 lines"),
    ("SecretKey=hunter2", "a name before the key"),
    ("export TENCENTCLOUD_SECRET_KEY=hunter2", "a name before the key"),
    ("secret_key: hunter2", "a name before the key"),
    ('"secretKey": "hunter2",', "a name before the key"),
]


def given(way: str, key: str, value: str, folder: Path) -> tuple[str, dict[str, str], str]:
    """A configuration with one part of the API key in one place, its environment, and how a problem with it begins."""
    file = folder / f"my_{key}"
    other = {"secret_id": "secret_key", "secret_key": "secret_id", "token": "secret_id"}[key]
    rest = f'{VALID}[credentials]\n{other} = "right"\n' + ('secret_key = "right"\n' if key == "token" else "")
    match way:
        case "file":
            file.write_text(value, encoding="utf-8", newline="")
            return f'{rest}{key}_file = "{file}"', {}, f"credentials.{key}_file: {file} "
        case "directory":
            for name, content in {"secret_id": "right", "secret_key": "right", key: value}.items():
                (folder / name).write_text(content, encoding="utf-8", newline="")
            return VALID, {"CREDENTIALS_DIRECTORY": str(folder)}, f"credentials.{key}_file: {folder / key} "
        case "environment":
            names = {"secret_id": "right", "secret_key": "right", key: value}
            env = {f"TENCENTCLOUD_{name.upper()}": content for name, content in names.items()}
            return VALID, env, f"credentials.{key}: $TENCENTCLOUD_{key.upper()} "
        case _:
            return f"{rest}{key} = {json.dumps(value)}", {}, f"credentials.{key}: "


@pytest.mark.parametrize("way", ["file", "directory", "environment", "inline"])
@pytest.mark.parametrize("key", ["secret_id", "secret_key", "token"])
@pytest.mark.parametrize(("value", "words"), UNFIT_KEYS)
def test_what_cannot_be_part_of_a_key_is_named_with_its_place(tmp_path, way, key, value, words):
    text, env, place = given(way, key, value, tmp_path)
    (problem,) = problems_of(text, tmp_path, env)
    assert problem.startswith(place)
    assert words in problem
    assert "hunter" not in problem


@pytest.mark.parametrize("way", ["file", "directory", "environment", "inline"])
@pytest.mark.parametrize("key", ["secret_id", "secret_key", "token"])
@pytest.mark.parametrize("value", ["hunter2", "hunter2\n", "\r\nhunter2\r\n\r\n", "aZ09+/-_.~*==", "id=="])
def test_line_ends_around_a_key_are_not_part_of_it(tmp_path, way, key, value):
    text, env, _ = given(way, key, value, tmp_path)
    assert getattr(load(text, tmp_path, env).credentials, key).get() == value.strip()


@pytest.mark.parametrize(("value", "words"), [UNFIT_KEYS[0], UNFIT_KEYS[-5]])
def test_a_key_that_is_read_again_is_checked_again(tmp_path, value, words):
    text, env, _ = given("file", "secret_key", "right", tmp_path)
    secret = load(text, tmp_path, env).credentials.secret_key
    (tmp_path / "my_secret_key").write_text(value)
    with pytest.raises(OSError, match=re.escape(words)) as caught:
        secret.reread()
    assert "hunter" not in str(caught.value)
    assert secret.get() == "right"


@pytest.mark.parametrize(
    ("way", "renewal"),
    [
        ("file", "restart the daemon"),  # the other half of the key is in the configuration
        ("directory", "restart the service (systemd copies the files of LoadCredential= only at its start)"),
        ("environment", "restart the daemon"),
        ("inline", "restart the daemon"),
    ],
)
def test_the_keys_place_decides_how_the_daemon_reads_it_again(tmp_path, way, renewal):
    text, env, _ = given(way, "secret_key", "right", tmp_path)
    assert load(text, tmp_path, env).key_renewal == renewal


@pytest.mark.parametrize("env", [{}, {"CREDENTIALS_DIRECTORY": "/run/credentials/vodpoller.service"}])
def test_a_key_in_files_that_may_change_is_read_again_at_sighup(tmp_path, env):
    for name in ("id", "key"):
        (tmp_path / name).write_text("right")
    files = f'secret_id_file = "{tmp_path}/id"\nsecret_key_file = "{tmp_path}/key"'
    assert load(f"{VALID}[credentials]\n{files}", tmp_path, env).key_renewal == "send SIGHUP"


def test_a_models_own_error_hides_its_input():
    class Table(HasSecrets):
        password: Secret | None = None
        password_file: str | None = None

    with pytest.raises(ValueError, match="must be text") as caught:
        Table.model_validate({"password": ["hunter2"]})
    assert "hunter2" not in str(caught.value)
    assert "hunter2" not in Table.model_validate({"password": "hunter2"}).model_dump_json()


# --- valid configurations, and CA files


@pytest.mark.parametrize("content", [None, "no PEM", "-----BEGIN CERTIFICATE-----\nMII=\n-----END CERTIFICATE-----\n"])
@pytest.mark.parametrize("table", ["api", "hook"])
def test_an_unusable_ca_file_is_a_problem_with_its_reason(tmp_path, table, content):
    path = tmp_path / "ca.pem"
    if content is not None:
        path.write_text(content)
    hook = '[sinks.hook]\ntype = "webhook"\nurl = "https://app.example/"\n'
    route = '[[routes]]\nname = "hooks"\nsinks = ["hook"]\n'
    key = f'ca_file = "{path}"\n'
    text = f"{VALID}{route}{hook}{key}" if table == "hook" else f"[api]\n{key}{VALID}"
    (problem,) = problems_of(text, tmp_path)
    reason = "which does not exist" if content is None else "certificates in PEM"
    assert problem.startswith(f"{'sinks.hook' if table == 'hook' else 'api'}.ca_file: is {path}, which ")
    assert reason in problem


def test_a_minimal_file_gets_the_documented_defaults(tmp_path):
    loaded = load(VALID, tmp_path)
    assert loaded.api.model_dump() == {
        "endpoint": "https://vod.tencentcloudapi.com",
        "region": None,
        "ca_file": None,
        "timeout_secs": 10,
        "lease_secs": 30,
        "confirm_reserve_secs": 5,
        "confirm_timeout_secs": 2,
        "requests_per_sec": 100,
    }
    assert loaded.sources[0].model_dump() == {
        "name": "main",
        "type": "pull",
        "sub_app_id": None,
        "interval_secs": 1,
        "long_poll": True,
        "max_concurrent_pulls": 16,
        "on_failure": "store",
        "unrouted": "dead_letter",
    }
    assert loaded.journal.model_dump() == {
        "path": Path("/var/lib/vodpoller/journal.db"),
        "max_bytes": 1073741824,
        "ledger_days": 5,
    }
    assert loaded.log.model_dump() == {"level": "info", "format": None}
    assert loaded.daemon.shutdown_secs == 25
    assert loaded.routes[0].sinks == ("archive",)
    assert isinstance(loaded.sinks["archive"], loaded.sink_classes["archive"].Config)


@pytest.mark.parametrize(
    ("lease", "reserve", "timeout"),
    [("30", 5, 2), ("3600", 5, 2), ("6", 1, 0.4), ("6\nconfirm_reserve_secs = 3", 3, 1.2)],
)
def test_the_defaults_of_confirming_shrink_with_a_short_lease(tmp_path, lease, reserve, timeout):
    api = load(f"{VALID}[api]\nlease_secs = {lease}", tmp_path).api
    assert (api.confirm_reserve_secs, api.confirm_timeout_secs) == pytest.approx((reserve, timeout))


@pytest.mark.parametrize(
    ("endpoint", "kept"),
    [
        ("http://127.0.0.1:9000", "http://127.0.0.1:9000"),
        ("http://localhost:9000/", "http://localhost:9000"),
        ("http://[::1]:9000", "http://[::1]:9000"),
        ("https://vod.intl.example", "https://vod.intl.example"),
    ],
)
def test_plain_http_is_for_this_machine_only(tmp_path, endpoint, kept):
    assert load(f'{VALID}[api]\nendpoint = "{endpoint}"', tmp_path).api.endpoint == kept


def test_a_region_missing_in_the_file_comes_from_the_environment(tmp_path):
    env = {**ENV, "TENCENTCLOUD_REGION": "ap-beijing"}
    assert load(VALID, tmp_path, env).api.region == "ap-beijing"
    assert load(VALID + '[api]\nregion = "ap-guangzhou"', tmp_path, env).api.region == "ap-guangzhou"
    assert load(VALID, tmp_path, {**ENV, "TENCENTCLOUD_REGION": ""}).api.region is None


def test_a_byte_order_mark_and_windows_line_ends_are_accepted(tmp_path):
    (tmp_path / "config.toml").write_bytes(VALID.replace("\n", "\r\n").encode("utf-8-sig"))
    assert config.load(tmp_path / "config.toml", env=ENV).sources[0].name == "main"


@pytest.mark.parametrize("glob", ["*", "a?c", "[ab]*", "[!ab]", "[]]", "[!]]x", "a]"])
def test_globs_may_use_brackets(tmp_path, glob):
    text = VALID.replace('["archive"]', f'["archive"]\nevent_types = ["{glob}"]')
    assert load(text, tmp_path).routes[0].event_types == (glob,)


def test_sources_with_and_without_a_sub_app_id_are_different_queues(tmp_path):
    text = VALID.replace(SOURCE, SOURCE + SOURCE.replace("main", "other") + "sub_app_id = 7")
    assert [source.sub_app_id for source in load(text, tmp_path).sources] == [None, 7]


def test_a_dictionary_is_accepted_like_a_file(tmp_path):
    data = {**tomllib.loads(VALID), "credentials": {"secret_id": "id", "secret_key": Secret(value="key")}}
    loaded = config.from_dict(data, where="demo", base=tmp_path, env={})
    assert key_of(loaded) == ("id", "key", None)
    with pytest.raises(ConfigError, match=r"^demo: log: must be a table"):
        config.from_dict({**data, "log": 5}, where="demo", base=tmp_path, env={})


@pytest.mark.system
def test_reading_does_not_import_what_only_some_sinks_need():
    code = (
        "import sys, vodpoller.config.load\n"
        "sys.exit(bool({'requests', 'vodpoller.sinks.tencent', 'vodpoller.sinks.webhook'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- the example and the schema

BUILT_IN = ("download", "exec", "file", "mysql", "postgresql", "sqlite", "stdout", "tencent", "webhook")
SECRETS = {"events_dsn": "host=db.example dbname=app", "mysql_dsn": "mysql://vodpoller:hunter2@db.example/app"}
_OPTIONAL = re.compile(r"# (?=[a-z_]+ = |\[)")


def models() -> dict[str, type[BaseModel]]:
    """The model of every possible table, by the table's name; of sinks and callback sources by their type."""
    tables = {name: model for name, model in TABLES.items() if name != "sinks"}
    own = {"callback": CallbackSource, **{name: available_sinks()[name].load().Config for name in BUILT_IN}}
    return tables | own


def example_with_everything(*, files: bool, folder: Path) -> dict[str, Any]:
    """The example with every optional line active; each secret is given either by its value or by its file."""
    text = "\n".join(_OPTIONAL.sub("", line, count=1) for line in EXAMPLE.read_text(encoding="utf-8").splitlines())
    data = tomllib.loads(text)
    for table in (data["api"], *data["sinks"].values()):
        if "ca_file" in table:
            table["ca_file"] = requests.utils.DEFAULT_CA_BUNDLE_PATH
    for table in (data["credentials"], *data["sources"], *data["sinks"].values()):
        for twin in [key for key in table if f"{key}_file" in table]:
            name = table[f"{twin}_file"]
            secret = "https://app.example/" if twin == "url" else SECRETS.get(name, WEBHOOK_SECRET)
            (folder / name).write_text(secret)
            del table[twin if files else f"{twin}_file"]
    (folder / data["listener"]["password_file"]).write_text(WEBHOOK_SECRET)
    return data


def test_the_example_is_valid_unchanged():
    loaded = config.load(EXAMPLE, env=ENV)
    assert [source.name for source in loaded.sources] == ["main"]
    assert loaded.coverage == {"main": False}


@pytest.mark.parametrize("files", [True, False])
@pytest.mark.parametrize("provider", ["static", *KEYS_OF_ROLES])
def test_the_example_is_valid_with_every_optional_line(tmp_path, files, provider):
    data = example_with_everything(files=files, folder=tmp_path)
    allowed = {*KEYS_OF_ROLES.get(provider, ()), *(() if provider == "cvm_role" else KEYS_OF_A_GIVEN_KEY)}
    table = {key: value for key, value in data["credentials"].items() if key in allowed}
    data["credentials"] = {**table, "provider": provider}
    names = re.findall(r"\$\{([A-Z_]+)\}", EXAMPLE.read_text(encoding="utf-8"))
    env = dict.fromkeys(names, WEBHOOK_SECRET)
    loaded = config.from_dict(data, where="example", base=tmp_path, env=env)
    assert {sink.type for sink in loaded.sinks.values()} == set(BUILT_IN)
    assert len(loaded.routes) == 3


@pytest.mark.parametrize("name", [*(name for name in TABLES if name != "sinks"), "callback", *BUILT_IN])
def test_the_example_has_every_key_with_its_default(tmp_path, name):
    data = example_with_everything(files=True, folder=tmp_path)
    bare = example_with_everything(files=False, folder=tmp_path)
    tables: list[dict[str, Any]] = []
    for whole in (data, bare):
        if name in BUILT_IN:
            tables += [sink for sink in whole["sinks"].values() if sink["type"] == name]
        elif name in ("sources", "callback"):
            is_callback = name == "callback"
            tables += [it for it in whole["sources"] if (it["type"] == "callback") == is_callback]
        else:
            tables += whole[name] if isinstance(whole[name], list) else [whole[name]]
    shown = {key: value for table in tables for key, value in table.items()}
    # The keys that all sinks share are shown at the first sink only.
    common = set(SinkConfig.model_fields) if name in BUILT_IN and name != "file" else set()
    if name in ("mysql", "sqlite"):  # their keys are shown at "postgresql"
        common |= set(SqlConfig.model_fields)
    if name == "callback":
        common = set(AnySource.model_fields)
    model = models()[name]
    assert set(shown) - common == set(model.model_fields) - common
    for key, field in model.model_fields.items():
        default = field.get_default(call_default_factory=True, validated_data={})
        if key not in common and not field.is_required() and default is not None:
            assert shown[key] == (str(default) if isinstance(default, Path) else default), key


def test_every_key_is_described_and_has_bounds():
    for name, model in models().items():
        for key, field in model.model_fields.items():
            assert field.description, f"{name}.{key}"
            if field.annotation in (int, float):
                assert field.metadata, f"{name}.{key}"


def test_the_schema_describes_all_tables_and_the_keys_of_each_sink():
    schema = json_schema()
    assert set(schema["properties"]) == set(TABLES)
    assert schema["additionalProperties"] is False
    sinks = schema["properties"]["sinks"]["additionalProperties"]
    assert set(BUILT_IN) <= set(sinks["properties"]["type"]["enum"])
    references = re.findall(r"'\$ref': '#/\$defs/(\w+)'", str(schema))
    assert references
    assert set(references) <= set(schema["$defs"])
    assert schema["$defs"]["Api"]["properties"]["confirm_reserve_secs"]["default"] == 5


# --- secrets that others may read -------------------------------------------------------------------------------------

ROUTED_TO_HOOK = (
    SOURCE + ROUTE.replace('"archive"', '"hook"') + '[sinks.hook]\ntype = "webhook"\nurl = "https://app.example/"\n'
)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (VALID + '[credentials]\nsecret_id = "AKIDme"\nsecret_key = "0123456789"', ["credentials.secret_key"]),
        (ROUTED_TO_HOOK + f'secret = "{WEBHOOK_SECRET}"', ["sinks.hook.secret"]),
        (ROUTED_TO_HOOK + 'headers = { Authorization = "Bearer x", "X-Auth-Token" = "y", "X-Env" = "prod" }',
         ["sinks.hook.headers.Authorization", "sinks.hook.headers.X-Auth-Token"]),
        (ROUTED_TO_HOOK + 'headers = { Authorization = "Bearer ${TENCENTCLOUD_SECRET_KEY}" }', []),
        (SOURCE + ROUTE.replace('"archive"', '"rows"') + '[sinks.rows]\ntype = "mysql"\ndsn = "mysql://u:p@h/d"\n',
         ["sinks.rows.dsn"]),
        (VALID, []),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("mode", "exposed"), [(0o644, True), (0o604, True), (0o640, False), (0o600, False)])
def test_a_secret_in_a_file_that_others_may_read_is_warned_of(tmp_path, text, keys, mode, exposed):
    path = tmp_path / "config.toml"
    path.write_text(text)
    path.chmod(mode)

    warnings = config.load(path, env=ENV).warnings

    assert [warning.split(": ")[0] for warning in warnings] == (keys if exposed else [])
    assert all("every user of this machine may read" in warning and "chmod o=" in warning for warning in warnings)
    assert "0123456789" not in "".join(warnings)


def test_no_pattern_of_a_key_fills_the_memory():
    """In pydantic `\\w` matches all of Unicode: repeated up to 128 times, it takes tens of MB."""
    source = Path(tables.__file__).read_text()
    assert not re.findall(r'pattern=r"[^"]*\\w[^"]*"', source)
