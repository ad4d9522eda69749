"""`/metrics`: exactly the promised names and labels, all of them from the start, with the right values."""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.listening import NOW, WELL, Shown, running_listener
from tests.processes import needs
from vodpoller.events.types import DOCUMENTED_EVENT_TYPES
from vodpoller.settlement import CallbackResult, ConfirmResult, Reason, Settlement
from vodpoller.status import CredentialsStatus, ReloadStatus, SinkStatus, SourceStatus, StoredStatus
from vodpoller.telemetry import Count, Duration, Gauge

PAGE = Path(__file__).parents[2] / "vodpoller" / "listener" / "README.md"

# The labels of each metric, in the order of the table in the listener's README.
PROMISED = {
    "build_info": "version python",
    "config_last_reload_successful": "",
    "config_last_reload_success_timestamp_seconds": "",
    "pulls_total": "source result",
    "pull_errors_total": "source code",
    "pull_last_success_timestamp_seconds": "source",
    "pulls_in_flight": "source",
    "queue_events": "source",
    "events_received_total": "source event_type",
    "events_redelivered_total": "source",
    "events_settled_total": "source settlement reason",
    "event_settle_duration_seconds": "source",
    "confirms_total": "source result",
    "callbacks_total": "source result",
    "leases_expired_total": "source",
    "sink_deliveries_total": "sink outcome",
    "sink_attempts_total": "sink result",
    "sink_delivery_duration_seconds": "sink",
    "sink_queue_events": "sink",
    "sink_queue_limit_events": "sink",
    "sink_up": "sink",
    "sink_last_success_timestamp_seconds": "sink",
    "pending_events": "sink",
    "pending_oldest_timestamp_seconds": "sink",
    "dead_letters": "sink reason",
    "dead_letters_created_total": "sink reason",
    "journal_size_bytes": "",
    "journal_limit_bytes": "",
    "journal_errors_total": "",
    "journal_commit_duration_seconds": "",
    "credentials_expiry_timestamp_seconds": "",
    "credentials_refreshes_total": "result",
    "clock_offset_seconds": "",
    "log_lines_dropped_total": "",
}
BUCKETS = ["0.005", "0.01", "0.025", "0.05", "0.1", "0.25", "0.5", "1.0", "2.5", "5.0", "10.0", "20.0", "30.0", "+Inf"]


def scraped(shown, **headers):
    with running_listener(shown) as client:
        answer = client.get("/metrics", **headers)
    assert answer.status == 200
    return answer


def samples(shown):
    """The value of each label set, by the name of the sample without the prefix `vodpoller_`."""
    found = defaultdict(dict)
    for family in text_string_to_metric_families(scraped(shown).text):
        for sample in family.samples:
            found[sample.name.removeprefix("vodpoller_")][frozenset(sample.labels.items())] = sample.value
    return found


def of(**labels):
    return frozenset(labels.items())


@pytest.fixture
def shown():
    """A view in which every value is known, so that every metric has a sample."""
    shown = Shown(clock_offset_secs=-0.5)
    shown.change(
        stored=[StoredStatus(sink="hook", state="pending", events=3, oldest_at=NOW - 60)],
        credentials=CredentialsStatus(provider="cvm_role", role="role r", expires_at=NOW + 3600),
    )
    shown.telemetry.set(Gauge.QUEUE_EVENTS, {(("source", "main"),): 12})
    return shown


def test_the_metrics_are_those_that_are_promised(shown):
    shown.change(sources=[*WELL.sources, SourceStatus(name="pushed", type="callback")])
    labels = defaultdict(set)
    for family in text_string_to_metric_families(scraped(shown).text):
        for sample in family.samples:
            name = re.sub(r"_(bucket|sum|count)$", "", sample.name) if family.type == "histogram" else sample.name
            labels[name].add(" ".join(label for label in sample.labels if label != "le"))
    own = {name.removeprefix("vodpoller_"): found for name, found in labels.items() if name.startswith("vodpoller_")}
    wanted = {name: {" ".join(sorted(names.split()))} for name, names in PROMISED.items()}
    assert {name: {" ".join(sorted(it.split())) for it in found} for name, found in own.items()} == wanted
    assert {name for name in labels if not name.startswith("vodpoller_")} >= {
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
    }


def test_the_page_has_a_row_for_each_metric():
    rows = re.findall(r"^\| `vodpoller_(\w+)(?:\{([^}]*)\})?` \|", PAGE.read_text(), re.MULTILINE)
    assert {name: labels.replace(",", " ") for name, labels in rows} == PROMISED
    assert [name for name, _ in rows] == list(PROMISED)


@pytest.mark.parametrize(
    ("name", "labels", "number"),
    [
        ("pulls_total", "result", 3),
        ("pull_errors_total", "code", 10),
        ("events_received_total", "event_type", len(DOCUMENTED_EVENT_TYPES) + 1),
        ("events_settled_total", "reason", len(Settlement) * (len(Reason) - 2)),
        ("confirms_total", "result", len(ConfirmResult)),
        ("sink_deliveries_total", "outcome", 5),
        ("sink_attempts_total", "result", 3),
        ("dead_letters", "reason", 3 * 4),
        ("dead_letters_created_total", "reason", 3 * 4),
        ("event_settle_duration_seconds_bucket", "le", len(BUCKETS)),
        ("sink_delivery_duration_seconds_bucket", "le", len(BUCKETS)),
        ("journal_commit_duration_seconds_bucket", "le", len(BUCKETS)),
        ("pending_events", "sink", 2),
        ("journal_errors_total", "", 1),
        ("leases_expired_total", "", 1),
    ],
)
def test_every_label_set_exists_from_the_start(name, labels, number):
    found = samples(Shown())[name]
    assert set(found.values()) == {0.0}
    assert len(found) == number
    assert not labels or all(labels in dict(key) for key in found)


def test_each_kind_of_source_has_its_own_metrics(shown):
    shown.change(sources=[SourceStatus(name="main"), SourceStatus(name="pushed", type="callback")])
    found = samples(shown)
    sources = {name: {dict(key)["source"] for key in values if "source" in dict(key)} for name, values in found.items()}
    for name in ("pulls_total", "pull_errors_total", "confirms_total", "pull_last_success_timestamp_seconds"):
        assert sources[name] == {"main"}, name
    assert sources["callbacks_total"] == {"pushed"}
    assert sources["events_settled_total"] == {"main", "pushed"}
    assert len(found["callbacks_total"]) == len(CallbackResult)


def test_the_kinds_of_failed_pulls_are_those_that_are_promised():
    codes = {dict(key)["code"] for key in samples(Shown())["pull_errors_total"]}
    promised = "request_limit auth unauthorized clock not_found parameter internal http connection unusable"
    assert codes == set(promised.split())


@pytest.mark.parametrize("known", [False, True])
def test_an_unknown_value_has_no_sample(shown, known):
    found = samples(shown if known else Shown())
    for name in ("queue_events", "clock_offset_seconds", "pending_oldest_timestamp_seconds"):
        assert bool(found[name]) is known


def test_counted_values_are_exported(shown):
    scope = shown.telemetry.scope()
    scope.count(Count.EVENTS_SETTLED, 7, source="main", settlement="store", reason="sink_down")
    scope.count(Count.DEAD_LETTERS_CREATED, 2, sink="(none)", reason="malformed")
    scope.measure(Duration.EVENT_SETTLE, (("source", "main"),), 0.03, 16)
    shown.telemetry.set(Gauge.DEAD_LETTERS, {(("reason", "rejected"), ("sink", "(removed)")): 4})
    shown.telemetry.set(Gauge.JOURNAL_SIZE, {(): 1234})
    found = samples(shown)
    assert found["events_settled_total"][of(source="main", settlement="store", reason="sink_down")] == 7
    assert found["dead_letters_created_total"][of(sink="(none)", reason="malformed")] == 2
    assert found["dead_letters"][of(sink="(removed)", reason="rejected")] == 4
    assert found["journal_size_bytes"][of()] == 1234
    buckets = {dict(key)["le"]: value for key, value in found["event_settle_duration_seconds_bucket"].items()}
    assert list(buckets) == BUCKETS
    assert (buckets["0.025"], buckets["0.05"], buckets["+Inf"]) == (0, 16, 16)
    assert found["event_settle_duration_seconds_count"][of(source="main")] == 16
    assert found["event_settle_duration_seconds_sum"][of(source="main")] == pytest.approx(0.48)


def test_values_of_the_status_are_exported(shown):
    shown.change(
        sources=[SourceStatus(name="main"), SourceStatus(name="other", last_pull_at=NOW, pulls_in_flight=4)],
        sinks=[SinkStatus(name="hook", down_since=NOW, queued=9, queue_max_events=10)],
        stored=[
            StoredStatus(sink="hook", state="pending", events=3, oldest_at=NOW - 60),
            StoredStatus(sink="gone", state="pending", events=4, oldest_at=NOW - 50),
            StoredStatus(sink="gone too", state="pending", events=5, oldest_at=NOW - 70),
            StoredStatus(sink="hook", state="dead", events=6, oldest_at=NOW - 90),
        ],
    )
    found = samples(shown)
    assert found["pull_last_success_timestamp_seconds"] == {of(source="main"): 0, of(source="other"): NOW}
    assert found["pulls_in_flight"][of(source="other")] == 4
    assert (found["sink_up"], found["sink_queue_events"]) == ({of(sink="hook"): 0}, {of(sink="hook"): 9})
    assert found["sink_queue_limit_events"] == {of(sink="hook"): 10}
    assert found["pending_events"] == {of(sink="hook"): 3, of(sink="(removed)"): 9}
    assert found["pending_oldest_timestamp_seconds"] == {of(sink="hook"): NOW - 60, of(sink="(removed)"): NOW - 70}
    assert found["journal_limit_bytes"] == {of(): WELL.journal.limit_bytes}
    assert found["clock_offset_seconds"] == {of(): -0.5}
    assert found["config_last_reload_successful"] == {of(): 1}
    assert found["config_last_reload_success_timestamp_seconds"] == {of(): WELL.started_at}


def test_a_failed_reload_is_exported(shown):
    shown.change(reload=ReloadStatus(successful=False, last_success_at=NOW - 5))
    found = samples(shown)
    assert found["config_last_reload_successful"] == {of(): 0}
    assert found["config_last_reload_success_timestamp_seconds"] == {of(): NOW - 5}


@pytest.mark.parametrize(
    ("accept", "content_type", "end"),
    [
        ("", "text/plain; version=", ""),
        ("application/openmetrics-text; version=1.0.0", "application/openmetrics-text; version=", "# EOF\n"),
        ("*/*", "text/plain; version=", ""),
    ],
)
def test_the_client_chooses_the_format(shown, accept, content_type, end):
    answer = scraped(shown, Accept=accept)
    assert answer.headers["Content-Type"].startswith(content_type)
    assert answer.text.endswith(end)


@pytest.mark.system
def test_promtool_accepts_the_metrics(shown):
    needs("promtool")
    text = scraped(shown).text
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_scrape_does_not_use_the_disk(shown):
    shown.report = lambda: 1 / 0
    assert scraped(shown).status == 200
