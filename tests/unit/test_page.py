"""The status page: what it shows; and text of events, receivers and VOD never becomes markup."""

import re
import time
from html.parser import HTMLParser

import pytest

from tests.helpers import event, log_into
from tests.listening import NOW, Shown, running_listener
from vodpoller.journal.contract import Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.logs import printable
from vodpoller.status import JournalStatus, PullError, SinkStatus, SourceStatus, StoredStatus
from vodpoller.telemetry import Count, Duration, Gauge, Telemetry

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'--><!--"
TURNED = "\u202etfel\u2066\u200f"
NUL = "a\x00b\x1b[31m"
LONG = "x" * 1_000_000
HOSTILE = [SCRIPT, TURNED, NUL, LONG]
IDS = ["script", "turned", "nul", "long"]


class Page(HTMLParser):
    """A page as a browser reads it: its elements and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements = []
        self.pieces = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] != "style":
            self.pieces.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.pieces).split())

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(shown, query="", **asked):
    with running_listener(shown) as client:
        answer = client.get(f"/{query}", **asked)
    assert answer.status == 200, answer.text
    assert len(answer.body) < 1_000_000
    return Page(answer.text)


@pytest.fixture
def shown(tmp_path):
    shown = Shown(journal_path=tmp_path / "journal.db")
    store(shown)
    return shown


def store(shown, *letters):
    journal = SqliteJournal(shown.journal_path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))
    journal.store(letters)
    journal.close()


def letter(number, **more):
    given = {"event": event(number), "sink": "hook", "dead": True, "reason": "rejected", "error": "HTTP 422"} | more
    return Letter(**given)


def settle(shown, **changes):
    fields = {
        "source": "main",
        "event_type": "FileDeleted",
        "key": "00" * 32,
        "task_id": "t-1",
        "file_id": "f-1",
        "routes": ("all",),
        "sinks": {"hook": {"outcome": "delivered", "reason": "delivered"}},
        "settlement": "confirm",
        "reason": "delivered",
        "confirmed": True,
        "confirm_result": "confirmed",
        "pull_request_id": "r-1",
        "duration_secs": 0.25,
        "lease_left_secs": 29.0,
        "redelivered": False,
    }
    shown.telemetry.remember(time.time(), [{**fields, **changes}])


# --- hostile text -----------------------------------------------------------------------------------------------------


def is_harmless(page, hostile):
    """Check that no markup came from the text. Returns True if the page shows the text's characters."""
    assert not {tag for tag, _ in page.elements} & {"script", "img", "iframe", "object", "svg"}
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\u200e\u200f\u202a-\u202e\u2066-\u2069]", page.text)
    return " ".join(printable(hostile[:60]).split()) in page.text


@pytest.mark.parametrize("hostile", HOSTILE, ids=IDS)
@pytest.mark.parametrize("name", ["event_type", "task_id", "file_id", "confirm_error_code"])
def test_fields_of_an_event_are_shown_as_text(shown, name, hostile):
    settle(shown, **{name: hostile, "confirmed": False})
    assert is_harmless(page_of(shown), hostile)


@pytest.mark.parametrize("hostile", HOSTILE, ids=IDS)
def test_errors_of_receivers_and_vod_are_shown_as_text(shown, hostile):
    shown.change(
        sources=[
            SourceStatus(
                name="main",
                failing_since=NOW,
                error=hostile,
                request_id=hostile,
                remedy=hostile,
                last_error=PullError(at=NOW, message=hostile, request_id=hostile),
            )
        ],
        sinks=[SinkStatus(name="hook", down_since=NOW, error=hostile)],
        journal=JournalStatus(path="/j.db", writable=False, error=hostile, remedy=hostile, limit_bytes=1),
    )
    assert is_harmless(page_of(shown), hostile)


@pytest.mark.parametrize("hostile", HOSTILE, ids=IDS)
def test_stored_events_are_shown_as_text(shown, hostile):
    shown.password = "the password"
    hostile_event = event(1, event_type=hostile, FileUploadEvent={"FileId": hostile, "TaskId": hostile})
    store(shown, letter(1, event=hostile_event, error=hostile))
    assert is_harmless(page_of(shown, password="the password"), hostile)


@pytest.mark.parametrize("name", ["sink", "type", "reason", "since", "file_id", "task_id", "refresh", "other"])
@pytest.mark.parametrize(
    "hostile", ["%3Cscript%3Ealert(1)%3C/script%3E", "%22%20onfocus=alert(1)%20x=", "%00%E2%80%AE"]
)
def test_query_parameters_are_shown_as_text(shown, name, hostile):
    store(shown, letter(1))
    assert is_harmless(page_of(shown, f"?{name}={hostile}"), "")


def test_a_secret_in_a_text_of_others_is_hidden(shown):
    shown.password = "the password"
    store(shown, letter(1, error=f"no: {shown.secret}"))
    settle(shown, file_id=shown.secret)
    shown.change(sinks=[SinkStatus(name="hook", down_since=NOW, error=f"you sent {shown.secret}")])
    page = page_of(shown, password="the password")
    assert shown.secret not in page.text
    assert page.text.count("[secret]") >= 4


# --- what it shows ----------------------------------------------------------------------------------------------------


def test_without_problems_the_page_says_that_events_flow(shown):
    page = page_of(shown)
    assert "Events flow" in page.text
    assert "Problems" not in page.text
    assert page.all("html") == [{"lang": "en"}]
    assert {"http-equiv": "refresh", "content": "10"} in page.all("meta")


def test_the_refresh_can_be_switched_off(shown):
    assert "refresh" not in str(page_of(shown, "?refresh=off").all("meta"))


def test_problems_come_first_with_cause_and_remedy(shown):
    shown.change(sinks=[SinkStatus(name="hook", down_since=NOW - 5, error="HTTP 503")])
    page = page_of(shown)
    assert page.text.index("HTTP 503") < page.text.index("What to do:") < page.text.index("Sources")
    assert "Bring its receiver back" in page.text
    assert page.text.startswith("1 problem · vodpoller")


def test_a_source_shows_its_rate_its_backlog_and_its_last_error(shown):
    shown.change(sources=[SourceStatus(name="main", last_error=PullError(at=NOW, message="no key", request_id="r-9"))])
    shown.telemetry.set(Gauge.QUEUE_EVENTS, {(("source", "main"),): 12_345})
    page = page_of(shown)
    assert "12,345" in page.text
    assert "no key RequestId r-9" in page.text
    assert "pulling" in page.text


def test_a_source_of_callbacks_shows_its_connections(shown):
    shown.change(sources=[SourceStatus(name="pushed", type="callback", connections=3, last_callback_at=NOW)])
    page = page_of(shown)
    assert "receiving 3 connections" in page.text
    assert "none: VOD sends them" in page.text


def test_an_unknown_backlog_is_shown_as_not_known(shown):
    assert "not known" in page_of(shown).text


def test_a_sink_shows_what_waits_for_it(shown):
    shown.change(
        sinks=[SinkStatus(name="hook", queued=7, queue_max_events=1024)],
        stored=[
            StoredStatus(sink="hook", state="pending", events=1234, oldest_at=time.time() - 7300),
            StoredStatus(sink="hook", state="dead", events=5, oldest_at=NOW),
            StoredStatus(sink="gone", state="pending", events=8, oldest_at=NOW),
        ],
    )
    text = page_of(shown).text
    assert "7 of 1,024" in text
    assert "1,234 oldest 2 h ago" in text
    assert "gone not configured" in text


def test_rates_are_those_of_the_recent_past(shown):
    scope = shown.telemetry.scope()
    scope.count(Count.SINK_ATTEMPTS, 1_000_000, sink="hook", result="accepted")
    scope.measure(Duration.SINK_DELIVERY, (("sink", "hook"),), 0.2, 100)
    text = page_of(shown).text
    assert re.search(r"up last success .*? ago [\d,.]{5,} /s 2\d\d ms", text)


def test_the_last_events_are_shown_with_their_reasons(shown):
    settle(shown, settlement="store", reason="sink_down", sinks={"hook": {"outcome": "failed", "reason": "sink_down"}})
    settle(shown, settlement="leave", reason="no_route", sinks={}, confirmed=False, confirm_result="not_allowed")
    text = page_of(shown).text
    assert text.index("leave no_route none not_allowed") < text.index(
        "store sink_down hook : sink_down confirmed 250 ms"
    )


def test_an_event_without_a_confirm_is_shown_as_not_tried(shown):
    settle(shown, settlement="leave", reason="journal_full")
    shown.telemetry.recent()[0][1].pop("confirm_result")
    assert "not tried" in page_of(shown).text


# --- stored events ----------------------------------------------------------------------------------------------------


def test_a_dead_letter_shows_its_error_and_the_command_for_it(shown):
    store(shown, letter(7))
    page = page_of(shown)
    assert "NewFileUpload rejected for hook" in page.text
    assert "HTTP 422" in page.text
    for command in ("deadletters replay", "deadletters purge", "deadletters replay 1"):
        assert f"vodpoller {command}" in page.text


@pytest.mark.parametrize("password", ["", "the password"])
def test_bodies_are_shown_only_if_there_is_a_password(shown, password):
    shown.password = password
    store(shown, letter(7))
    text = page_of(shown, password=password or None).text
    assert ('{"EventType":' in text) is bool(password)
    assert ("listener.password_file" in text) is not bool(password)


@pytest.mark.parametrize(
    ("query", "ids", "options"),
    [
        ("?sink=hook", [1, 2], "--sink hook"),
        ("?reason=malformed", [3], "--reason malformed"),
        ("?type=Trans*", [2], "--type 'Trans*'"),
        ("?file_id=1&since=3d", [1], "--since 3d --file-id 1"),
        ("?pending=1", [4], "--pending"),
        ("?since=2026-01-01", [1, 2, 3], "--since 2026-01-01"),
        ("", [1, 2, 3], ""),
    ],
)
def test_filters_are_those_of_the_command_which_is_shown(shown, query, ids, options):
    store(
        shown,
        letter(1),
        letter(2, event=event(2, event_type="TranscodeComplete")),
        letter(3, sink="", reason="malformed"),
        letter(4, dead=False, reason="sink_failed"),
    )
    page = page_of(shown, query)
    own = re.findall(r"vodpoller deadletters replay (?:--pending )?(\d+)(?![-\d])", page.text)
    assert [int(number) for number in own if int(number) < 10] == ids
    assert f"vodpoller deadletters replay {options}".strip() in page.text
    assert f"vodpoller deadletters purge {options}".strip() in page.text


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("?since=yesterday", "'yesterday' is neither a time"),
        ("?reason=sink_down", "dead events never have the reason 'sink_down'"),
        ("?sink=%00", "sink has characters that cannot be printed"),
    ],
)
def test_an_impossible_filter_is_reported(shown, query, words):
    store(shown, letter(1))
    text = page_of(shown, query).text
    assert words in text
    assert "deadletters purge" not in text


def test_only_the_first_stored_events_are_shown(shown):
    store(shown, *(letter(number) for number in range(40)))
    text = page_of(shown).text
    assert text.count("1 attempt") + text.count("0 attempts") == 25
    assert "These are the first" in text


def test_a_long_search_ends_at_its_time_limit(shown, monkeypatch):
    monkeypatch.setattr("vodpoller.listener.stored.SEARCH_SECS", -1.0)
    store(shown, letter(1), letter(2))
    assert "None among the events that were searched in time" in page_of(shown, "?file_id=999").text


def test_an_unreadable_journal_does_not_hide_the_other_parts(shown):
    shown.journal_path.write_bytes(b"this is not a database, but it is long enough to look at")
    page = page_of(shown)
    assert "Events flow" in page.text
    assert "the journal" in page.text
