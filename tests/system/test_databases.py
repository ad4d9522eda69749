"""Whole daemons that deliver to databases: with alternating kills, and the recipe of the page."""

import json
import re
from pathlib import Path

import pytest

import vodpoller
from tests.polling import until
from tests.processes import run_command
from tests.sinks.servers import postgresql
from tests.system.database_kills import DATABASES, run
from vodpoller.sinks.sql.postgresql import DIALECT

pytestmark = pytest.mark.long

SAMPLE = Path(__file__).parents[1] / "samples" / "normal-callback.json"
PAGE = Path(vodpoller.__file__).parent / "sinks" / "README.md"


@pytest.mark.timeout(400)
@pytest.mark.parametrize("database", DATABASES)
def test_with_alternating_kills_each_row_exists_and_counts_once(tmp_path, database):
    result = run(database, events=200, kills=2, seed=1, folder=tmp_path)
    assert result.is_clean, result


@pytest.fixture
def recipe():
    """The files of the page's recipe, by name."""
    text = PAGE.read_text()
    section = text[text.index("### Snapshot URLs into") : text.index("## exec")]
    return dict(re.findall(r"^```\w+\n(?:#|--) (\S+)\n(.*?)^```$", section, re.MULTILINE | re.DOTALL))


@pytest.fixture
def db():
    with postgresql().connect() as db:
        db.execute("DROP TABLE IF EXISTS media_snapshot, media_video, vodpoller_events, vodpoller_inbox")
        for statement in DIALECT.ddl("vodpoller_inbox"):
            db.execute(statement)
        yield db


def test_the_recipe_inserts_snapshot_urls_once_their_video_exists(system, recipe, db):
    db.execute(recipe["models.sql"])
    (system.folder / "events_dsn").write_text(postgresql().dsn)
    sample = json.loads(SAMPLE.read_text())
    payload = sample["SnapshotByTimeOffsetCompleteEvent"]
    payload["SnapshotInfoSet"].append({"ErrCode": 70000, "TimeOffset": 99, "Url": ""})
    simulator = system.simulator(visibility_secs=5)
    routes, sinks = recipe["snapshots.toml"].split("[sinks.", 1)
    system.configure(simulator.url, lease_secs=5.0, routes=routes, sinks=f"[sinks.{sinks}")
    checked = run_command("check", "-c", system.config_path)
    assert checked.returncode == 0, checked.stderr
    simulator.feed(json.dumps(sample))
    daemon = system.daemon()
    daemon.await_log("delivery.failed", where=lambda line: "is not present in table" in line["error_message"])
    db.execute("INSERT INTO media_video (file_id) VALUES (%s)", [payload["FileId"]])
    until(lambda: db.execute("SELECT 1 FROM media_snapshot").fetchone(), secs=60, what=daemon.tail)
    until(simulator.all_confirmed, what=daemon.tail)
    wanted = [
        (payload["FileId"], image["TimeOffset"], image["Url"])
        for image in payload["SnapshotInfoSet"]
        if image["ErrCode"] == 0
    ]
    assert wanted
    assert db.execute("SELECT video_id, time_offset_ms, url FROM media_snapshot ORDER BY id").fetchall() == wanted
    assert daemon.terminate()[0] == 0
