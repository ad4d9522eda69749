"""`vodpoller route` shows where events go, and changes nothing."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from vodpoller.cli.app import main
from vodpoller.cli.exits import EXIT_CONFIG
from vodpoller.config.load import load_routing
from vodpoller.router import Router

SAMPLE = Path(__file__).parents[1] / "samples" / "reliable-callback.json"
UPLOAD = '{"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": "5285890784246869930"}}'
DELETED = '{"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": ["5285890784246869930"]}}'
CONFIG = """
[[sources]]
name = "main"
sub_app_id = 15
unrouted = "dead_letter"

[[routes]]
name = "snapshots"
event_types = ["CreateSnapshotByTimeOffsetComplete"]
sinks = ["archive", "hook"]

[[routes]]
name = "uploads"
event_types = ["NewFile*"]
where = "FileUploadEvent.FileId == '5285890784246869930'"
sinks = ["hook"]

[sinks.archive]
type = "file"
path = "/proc/no/such/place"

[sinks.hook]
type = "webhook"
url = "https://app.example/${NOT_SET}"
secret_file = "no-such-secret"
"""
SECOND = '[[sources]]\nname = "second"\nsub_app_id = 2\nunrouted = "confirm"\n'


@pytest.fixture
def run(tmp_path):
    def invoke(*args, config=CONFIG, given=None):
        path = tmp_path / "config.toml"
        path.write_text(config)
        return CliRunner().invoke(main, ["route", "-c", str(path), *map(str, args)], input=given)

    return invoke


def judged(done):
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read: Expecting property name"),
        (f"{UPLOAD}\n{{\n", ", line 2: cannot be read: "),
        (f"[{UPLOAD}, 7]", ", event 2: cannot be read: an event is a JSON object"),
        ("\udcff", "cannot be read: it is not UTF-8 text"),
    ],
)
def test_an_unreadable_event_is_named_and_ends_with_1(run, tmp_path, text, message):
    path = tmp_path / "events.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    done = run("--json", path, SAMPLE)
    assert done.exit_code == 1
    assert f"vodpoller: {path}" in done.stderr
    assert message in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["event_type"] == "CreateSnapshotByTimeOffsetComplete"


def test_a_missing_file_ends_with_1(run, tmp_path):
    done = run(tmp_path / "none.json")
    assert done.exit_code == 1
    assert "none.json: cannot be read: no such file or directory" in done.stderr


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ('sinks = ["hook"]', 'routes.uploads.sinks: the sink "hok" does not exist'),
        ('unrouted = "dead_letter"', "sources.main.unrouted: is missing"),
        ("where = \"FileUploadEvent.FileId == '5285890784246869930'\"", "routes.uploads.where"),
    ],
)
def test_routes_that_cannot_be_used_end_with_78(run, wrong, message):
    right = {"sinks": 'sinks = ["hok"]', "unrouted": "", "where": 'where = "a b"'}[wrong.partition(" ")[0]]
    done = run(SAMPLE, config=CONFIG.replace(wrong, right))
    assert done.exit_code == EXIT_CONFIG
    assert message in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [([], "the source of the events is not clear"), (["--source", "mian"], "the configuration has no source 'mian'")],
)
def test_an_unclear_source_is_a_usage_error(run, args, message):
    done = run(*args, SAMPLE, config=CONFIG + SECOND)
    assert done.exit_code == 2
    assert message in done.stderr
    assert "main, second" in done.stderr


def test_without_a_file_it_is_a_usage_error(run):
    assert run().exit_code == 2


def test_an_answer_without_events_is_reported(run):
    done = run("-", given='{"Response": {"EventSet": null}}')
    assert (done.exit_code, done.stdout) == (0, "")
    assert "-: an answer without an event" in done.stderr


def test_each_route_is_listed_with_its_reason(run):
    assert run("-", given=UPLOAD.replace("930", "931")).stdout.splitlines()[2:] == [
        "  route snapshots does not: its event_types do not match: CreateSnapshotByTimeOffsetComplete",
        "  route uploads does not: its `where` does not hold: FileUploadEvent.FileId == '5285890784246869930' is false",
        "  no route takes it, so it becomes a dead letter",
    ]


def test_a_pattern_that_may_be_mistyped_is_named(run):
    done = run("-", given=DELETED, config=CONFIG.replace("NewFile*", "FileDelete"))
    assert "no route takes it, so it becomes a dead letter (was FileDelete to take it?)" in done.stdout


def test_a_failing_where_makes_dead_letters_for_its_sinks(run):
    done = run("-", given=UPLOAD, config=CONFIG.replace("FileUploadEvent.FileId == '5285890784246869930'", "length(A)"))
    assert "route uploads does not: `where` cannot be evaluated on this event" in done.stdout
    assert "  sink hook rejects it: it becomes a dead letter" in done.stdout
    assert "no route takes it" not in done.stdout


def test_the_routing_is_printed_as_text_and_as_json(run):
    done = run(SAMPLE)
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{SAMPLE}, event 1: CreateSnapshotByTimeOffsetComplete\n  key: ")
    assert done.stdout.endswith("  goes to: archive, hook\n")
    (found,) = judged(run("--json", SAMPLE))
    assert found["routes"] == [
        {"name": "snapshots", "takes": True, "why_not": None},
        {
            "name": "uploads",
            "takes": False,
            "why_not": "its event_types do not match: NewFile*",
        },
    ]
    assert found["sinks"] == ["archive", "hook"]
    assert len(bytes.fromhex(found["key"])) == 32


def test_no_file_is_made_or_changed(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = CONFIG.replace("/proc/no/such/place", str(tmp_path / "events.jsonl"))
    text += f'[journal]\npath = "{tmp_path}/state/journal.db"\n'
    assert run(SAMPLE, config=text).exit_code == 0
    assert [path.name for path in tmp_path.rglob("*")] == ["config.toml"]


def test_the_key_depends_on_the_application_of_the_source(run):
    keys = {
        judged(run("--json", "--source", name, SAMPLE, config=CONFIG + SECOND))[0]["key"] for name in ("main", "second")
    }
    assert len(keys) == 2


def test_an_event_without_a_task_id_has_no_key_yet(run):
    (found,) = judged(run("--json", "-", given=DELETED))
    assert found["key"] is None
    assert "key: a new one at each arrival, because the event has no id of its own" in run("-", given=DELETED).stdout


def test_control_characters_of_an_event_are_not_printed(run):
    done = run("-", given='{"EventType": "A\\u001b[2J"}')
    assert "\x1b" not in done.stdout


def test_the_routes_are_those_of_the_daemon(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    routing = load_routing(path, env={})
    assert [source.sub_app_id for source in routing.sources] == [15]
    assert Router(routing.routes).routes_for("main", "NewFileUpload") == ["uploads"]
