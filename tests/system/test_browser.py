"""The status page in a real browser: Debian's Chromium, which applies the page's own headers."""

import shutil
import time
from contextlib import contextmanager

import pytest
from playwright.sync_api import Error, sync_playwright

from tests.helpers import event, log_into
from tests.listening import NOW, Shown, running_listener
from tests.processes import needs
from vodpoller.journal.contract import Letter
from vodpoller.journal.sqlite import SqliteJournal
from vodpoller.status import PullError, SinkStatus, SourceStatus, StoredStatus
from vodpoller.telemetry import Gauge, Telemetry

pytestmark = pytest.mark.long

PASSWORD = "correct horse, battery"
HOSTILE = [
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">",
    "\u202etfel ot thgir\u2066\u200f \u0645\u0631\u062d\u0628\u0627",
    "a\x00b\x1b[31m",
    "W" * 1_000_000,
    '"><style>body{display:none}</style><a href="javascript:alert(1)">',
]
# The lowest contrast of a text on the page with its background (WCAG 2.1, "contrast ratio"), and its element.
LEAST_CONTRAST = """() => {
    const rgb = color => color.match(/[\\d.]+/g).map(Number);
    const light = ([r, g, b]) => {
        const [x, y, z] = [r, g, b].map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * x + 0.7152 * y + 0.0722 * z;
    };
    const behind = element => {
        for (; element; element = element.parentElement) {
            const color = rgb(getComputedStyle(element).backgroundColor);
            if (color.length === 3 || color[3] === 1) return color;
            if (color[3] !== 0) throw new Error("a colour that is partly transparent: " + element.outerHTML);
        }
        return [255, 255, 255];
    };
    let least = [99, "nothing", 0];
    const look = (element, color) => {
        const [a, b] = [light(rgb(color)), light(behind(element))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        if (ratio < least[0]) least = [ratio, element.outerHTML.slice(0, 200), least[2]];
        least[2] += 1;
    };
    for (const element of document.body.querySelectorAll("*")) {
        if (!element.checkVisibility()) continue;
        const text = [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim());
        if (text) look(element, getComputedStyle(element).color);
        if (element.placeholder) look(element, getComputedStyle(element, "::placeholder").color);
    }
    return least;
}"""
WIDTHS = "() => [document.documentElement.scrollWidth, window.innerWidth]"


@pytest.fixture(scope="module")
def chromium():
    needs("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"),
            args=["--no-sandbox", "--host-resolver-rules=MAP evil.example 127.0.0.1"],
        )
        yield browser
        browser.close()


@pytest.fixture
def shown(tmp_path):
    """A status with problems of every kind, most of them with hostile texts."""
    shown = Shown(journal_path=tmp_path / "journal.db", password=PASSWORD)
    journal = SqliteJournal(shown.journal_path, max_bytes=10**9, ledger_days=5, telemetry=Telemetry(log_into([])))
    journal.store(
        [
            Letter(
                event=event(number, event_type=text, FileUploadEvent={"FileId": text, "TaskId": text}),
                sink="hook",
                dead=True,
                reason="rejected",
                error=text,
            )
            for number, text in enumerate(HOSTILE)
        ]
    )
    journal.close()
    shown.change(
        sources=[
            SourceStatus(name="main", last_pull_at=NOW, last_error=PullError(at=NOW, message=text, request_id="r-1"))
            for text in HOSTILE
        ]
        + [SourceStatus(name="second", failing_since=NOW, error=HOSTILE[0], remedy="Do `this`")],
        sinks=[SinkStatus(name=f"hook{at}", down_since=NOW, error=text) for at, text in enumerate(HOSTILE)]
        + [SinkStatus(name="paused", paused_until=NOW, error="HTTP 429"), SinkStatus(name="archive" * 9)],
        stored=[
            StoredStatus(sink="hook0", state="pending", events=123_456_789, oldest_at=NOW - 60),
            StoredStatus(sink="gone", state="pending", events=3, oldest_at=NOW - 60),
            StoredStatus(sink="", state="dead", events=3, oldest_at=NOW - 60),
        ],
    )
    shown.telemetry.set(Gauge.QUEUE_EVENTS, {(("source", "main"),): 123_456_789})
    for settlement in ("confirm", "store", "leave"):
        shown.telemetry.remember(time.time(), [settled(text, settlement) for text in HOSTILE])
    return shown


def settled(text, settlement):
    return {
        "source": "main",
        "event_type": text[:200],
        "task_id": text[:200],
        "file_id": text[:200],
        "sinks": {f"sink-{at}": {"outcome": "delivered", "reason": "already_delivered"} for at in range(5)},
        "settlement": settlement,
        "reason": "left_by_configuration",
        "confirmed": False,
        "confirm_result": "refused_after_lost",
        "confirm_error_code": text[:200],
        "confirm_request_id": "9" * 200,
        "duration_secs": 0.25,
        "redelivered": True,
    }


@contextmanager
def opened(chromium, shown, *, query="", host="127.0.0.1", password=PASSWORD, **settings):
    """Open the page; yields the page, the HTTP answer, and the messages of console and dialogs."""
    credentials = {"username": "vodpoller", "password": password} if password else None
    with running_listener(shown) as client:
        context = chromium.new_context(http_credentials=credentials, **settings)
        try:
            page, messages = context.new_page(), []
            page.on("console", lambda message: messages.append(message.text))
            page.on("pageerror", lambda error: messages.append(str(error)))
            page.on("dialog", lambda dialog: messages.append(dialog.message))
            answer = page.goto(f"http://{host}:{client.port}/{query}")
            yield page, answer, messages
        finally:
            context.close()


@pytest.mark.parametrize("javascript", [True, False], ids=["script", "no script"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_page_is_readable_and_harmless(chromium, shown, theme, width, javascript):
    with opened(
        chromium,
        shown,
        query="?refresh=off",
        color_scheme=theme,
        viewport={"width": width, "height": 844},
        java_script_enabled=javascript,
    ) as (page, answer, messages):
        assert answer.status == 200
        assert page.title() == "7 problems · vodpoller"
        page.locator("summary").first.click()
        scroll_width, inner_width = page.evaluate(WIDTHS)
        assert scroll_width <= inner_width == width
        ratio, where, looked_at = page.evaluate(LEAST_CONTRAST)
        assert ratio >= 4.5, where
        assert looked_at > 300
        assert messages == []
        assert page.locator("body > *").count() == 3
        assert page.locator("script, img, main style, iframe").count() == 0


def test_without_problems_the_page_shows_none(chromium, tmp_path):
    shown = Shown(journal_path=tmp_path / "journal.db")
    for width in (1280, 390):
        with opened(chromium, shown, password=None, viewport={"width": width, "height": 844}) as (page, _, messages):
            assert page.locator(".state").inner_text() == "Events flow"
            assert page.locator(".problem").count() == 0
            assert page.evaluate(WIDTHS) == [width, width]
            assert page.evaluate(LEAST_CONTRAST)[0] >= 4.5
            assert messages == []


def test_a_command_is_selected_whole_by_a_click(chromium, shown):
    with opened(chromium, shown, query="?refresh=off&sink=hook&reason=rejected") as (page, _, _messages):
        page.locator(".commands .copy").first.click()
        selected = page.evaluate("() => getSelection().toString().trim()")
        assert selected == "vodpoller deadletters replay --sink hook --reason rejected"


def test_the_filters_work_without_a_script(chromium, shown):
    with opened(chromium, shown, java_script_enabled=False) as (page, _, _messages):
        page.get_by_role("textbox", name="sink").fill("hook")
        page.get_by_label("reason").select_option("rejected")
        page.get_by_role("button", name="Show").click()
        page.wait_for_url("**/?refresh=off&**sink=hook**")
        assert page.locator(".letter").count() == len(HOSTILE)
        page.get_by_role("textbox", name="sink").fill("another")
        page.get_by_role("button", name="Show").click()
        page.wait_for_url("**sink=another**")
        assert page.locator(".letter").count() == 0


@pytest.mark.parametrize(
    ("host", "password", "status"),
    [("127.0.0.1", "wrong", 401), ("evil.example", PASSWORD, 421)],
    ids=["wrong password", "wrong host"],
)
def test_a_wrong_password_or_host_sees_nothing(chromium, shown, host, password, status):
    with opened(chromium, shown, host=host, password=password) as (page, answer, _messages):
        assert answer.status == status
        assert "hook" not in page.content()


def test_a_browser_without_a_password_asks_for_one(chromium, shown):
    with (
        pytest.raises(Error, match="ERR_INVALID_AUTH_CREDENTIALS"),
        opened(chromium, shown, password=None),
    ):
        pass
