import ast
import json
import logging
import os
import re
import socket
import threading
import time
import tracemalloc
import warnings
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vodpoller
from tests.helpers import log_into, named
from vodpoller.logs import CATALOGUE, LINE_MAX_BYTES, LineLogger, RepeatLimiter, make_logger, printable
from vodpoller.outlet import Outlet
from vodpoller.telemetry import Telemetry

SECRET = "AKIDz8krbsJ5yKBZQpn74WFkmLPx3EXAMPLE"


@pytest.fixture
def output(tmp_path):
    """Makes a logger on a file, and reads what it wrote."""
    path = tmp_path / "stderr"
    with path.open("w", encoding="utf-8") as stream, warnings.catch_warnings():
        warnings.simplefilter("always")

        class Output:
            def __init__(self):
                self.stream = stream

            def logger(self, **more):
                return make_logger(stream, **{"level": "debug", "log_format": "json", **more})

            @property
            def bytes(self):
                return path.read_bytes()

            @property
            def lines(self):
                return [json.loads(line) for line in self.bytes.splitlines()]

        yield Output()


def journald_stream_of(stream):
    status = os.fstat(stream.fileno())
    return f"{status.st_dev}:{status.st_ino}"


# --- the form of a line -----------------------------------------------------------------------------------------------


def test_a_line_is_a_json_object_that_begins_with_common_fields(output):
    output.logger().info("event.settled", source="main", sinks={"a": "delivered"}, duration_secs=0.5, confirmed=True)
    (line,) = output.lines
    assert list(line)[:3] == ["timestamp", "level", "event"]
    moment = datetime.fromisoformat(line.pop("timestamp"))
    assert moment.tzinfo is not None
    assert abs((datetime.now(UTC) - moment).total_seconds()) < 60
    assert line == {
        "level": "info",
        "event": "event.settled",
        "source": "main",
        "sinks": {"a": "delivered"},
        "duration_secs": 0.5,
        "confirmed": True,
    }


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error"])
def test_lines_below_the_level_are_not_written(output, level):
    log = output.logger(level=level)
    every = ["debug", "info", "warning", "error"]
    for name in every:
        getattr(log, name)("daemon.started")
    assert [line["level"] for line in output.lines] == every[every.index(level) :]


def test_an_exception_is_a_field_with_its_traceback(output):
    log = output.logger()
    try:
        int("why")
    except ValueError as error:
        log.exception("puller.failed")
        log.warning("puller.failed", exc_info=error)
    for line in output.lines:
        assert "Traceback" in line["exception"]
        assert "ValueError: invalid literal for int() with base 10: 'why'" in line["exception"]
        assert "exc_info" not in line


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("lone \ud800", "lone \\ud800"),
        (2**63 - 1, 2**63 - 1),
        (2**64, str(2**64)),
        (10**400, str(10**400)),
        (b"\x00\xff", "00ff"),
        ({"b", "a"}, ["a", "b"]),
        (Path("/x"), "/x"),
        (float("nan"), None),
        ({1: {"\udfff": 2**70}}, {"1": {"\\udfff": str(2**70)}}),
        ([None, True, ("x", 2**65)], [None, True, ["x", str(2**65)]]),
        (ValueError("why"), "why"),
    ],
)
def test_a_value_that_json_cannot_hold_changes_no_other_field(output, value, written):
    output.logger().info("event.settled", source="main", attempt=1, value=value)
    (line,) = output.lines
    assert (line["level"], line["event"], line["source"], line["attempt"]) == ("info", "event.settled", "main", 1)
    assert line["value"] == written


nasty = st.recursive(
    st.one_of(
        st.text(st.characters(), max_size=50).map(lambda text: text * 97),
        st.integers(-(10**300), 10**300),
        st.floats(),
        st.none(),
        st.booleans(),
        st.binary(max_size=300).map(lambda data: data * 40),
        st.sampled_from(["\ud800" * 9000, "\x00" * 20_000, '"\\' * 9000, "🎬" * 9000]),
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,12}", fullmatch=True), nasty, max_size=30), st.booleans())
def test_any_fields_make_one_json_line_within_the_limit(fields, has_error):
    reserved = {"event", "level", "timestamp", "exc_info", "exception", "stack_info"}
    stream = StringIO()
    log = make_logger(stream, log_format="json", secrets=lambda: [SECRET])
    error = ValueError("x" * 40_000) if has_error else None
    log.info("event.settled", **{n: v for n, v in fields.items() if n not in reserved}, exc_info=error)
    line = stream.getvalue()
    assert len(line.encode()) <= LINE_MAX_BYTES
    assert line.count("\n") == 1
    read = json.loads(line)
    assert (read["level"], read["event"]) == ("info", "event.settled")


def test_a_line_with_very_many_fields_keeps_event_and_source(output):
    output.logger().info("event.settled", source="main", **{f"field_{number}" * 20: "x" * 500 for number in range(500)})
    assert len(output.bytes) <= LINE_MAX_BYTES
    (line,) = output.lines
    assert (line["event"], line["source"], line["truncated"]) == ("event.settled", "main", True)


def test_a_long_field_is_cut_and_the_others_are_whole(output):
    output.logger().error("worker.failed", sink="archive", number=7, error_message="x" * 100_000, flags=[1, 2])
    (line,) = output.lines
    assert line["truncated"] is True
    assert (line["sink"], line["number"]) == ("archive", 7)
    assert line["error_message"].startswith("xxx")
    assert line["error_message"].endswith("…")


def test_a_line_that_fits_is_not_cut(output):
    output.logger().error("puller.failed", error_message="x" * 15_000)
    (line,) = output.lines
    assert len(line["error_message"]) == 15_000
    assert "truncated" not in line


# --- terminal output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "\\u001b[31mred"),
        ("\x1b]52;c;cm0gLXJm\x07", "\\u001b]52;c;cm0gLXJm\\u0007"),
        ("\x9b2Jcleared", "\\u009b2Jcleared"),
        ("safe\u202etxt.exe", "safe\\u202etxt.exe"),
        ("\u2066isolated\u2069", "\\u2066isolated\\u2069"),
        ("overwritten\rby this", "overwritten\\rby this"),
        ("\x7f\x08", "\\u007f\\b"),
        ("/srv/\udcff", "/srv/\\udcff"),
        ("\U000e0041", "\\udb40\\udc41"),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert printable(text) == shown


@pytest.mark.parametrize(
    "text", ["", "two\nlines\tand a tab", "视频 ünïcode ✓", "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\\u001b"]
)
def test_printable_text_stays_unchanged(text):
    assert printable(text) == text


@given(st.text())
def test_a_json_document_means_the_same_when_it_is_made_printable(text):
    document = json.dumps({text: [text]}, ensure_ascii=False)
    assert json.loads(printable(document)) == {text: [text]}
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable(text))


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("character", ["\x1b", "\x9b", "\x7f", "\u202e", "\u2066", "\r", "\n"])
def test_no_log_line_holds_control_characters(output, log_format, character):
    output.logger(log_format=log_format).info("event.settled", error_message=f"a{character}b", more=[character])
    assert character not in output.bytes.decode().removesuffix("\n")


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("how", ["exc_info", "exception"])
def test_a_traceback_shows_no_values_of_variables(output, log_format, how):
    log = output.logger(log_format=log_format)
    password = str(271828 * 314159)
    try:
        int("why", base=len(password))
    except ValueError as error:
        log.warning("puller.failed", exc_info=error) if how == "exc_info" else log.exception("puller.failed")
    assert b"Traceback" in output.bytes
    assert password.encode() not in output.bytes


# --- secrets ----------------------------------------------------------------------------------------------------------


def secret_everywhere(log, secret):
    log.info("event.settled", source=secret, nested={"a": [f"x{secret}y"]}, path=Path(secret))
    log.info("event.settled", error_message="x" * 300 + f"Authorization: {secret}")
    logging.getLogger("urllib3").error("header %s", secret)
    warnings.warn(f"about {secret}", UserWarning, stacklevel=1)
    try:
        int(secret)
    except ValueError:
        log.exception("puller.failed")


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_secret_is_in_no_line_wherever_it_came_from(output, log_format):
    log = output.logger(log_format=log_format, secrets=lambda: ["", "other", SECRET])
    secret_everywhere(log, SECRET)
    assert SECRET.encode() not in output.bytes
    assert output.bytes.count(b"[secret]") >= 6
    assert b"event.settled" in output.bytes


@pytest.mark.parametrize("secret", ['quo"te and back\\slash', "tab\tand\nline", "slash/and ünïcode ✓", "\x7f\x01" * 4])
def test_a_secret_that_json_escapes_is_found(output, secret):
    log = output.logger(secrets=lambda: [secret])
    log.info("event.settled", error_message=f"it is {secret}!")
    assert output.lines[0]["error_message"] == "it is [secret]!"


def test_a_line_that_is_cut_shows_no_part_of_a_secret(output):
    log = output.logger(secrets=lambda: [SECRET])
    for before in range(0, 200, 3):
        log.info("event.settled", error_message="y" * before + SECRET * 1000)
    assert SECRET[:6].encode() not in output.bytes


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_an_empty_secret_hides_nothing(output, log_format):
    output.logger(log_format=log_format, secrets=lambda: [""]).info("daemon.started")
    assert b"[secret]" not in output.bytes
    assert b"daemon.started" in output.bytes


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("secret", ["y", "x", "1234567"])
def test_a_secret_of_less_than_8_characters_is_not_looked_for(output, log_format, secret):
    log = output.logger(log_format=log_format, secrets=lambda: [secret])
    log.info("event.settled", key="my x and y", number=1234567)
    assert b"[secret]" not in output.bytes
    assert b"my x and y" in output.bytes


@pytest.mark.parametrize("log_format", ["json", "console"])
@pytest.mark.parametrize("secret", ["duration_secs", "settlement", "event.settled", "timestamp"])
def test_a_secret_does_not_change_names_of_fields_and_events(output, log_format, secret):
    log = output.logger(log_format=log_format, secrets=lambda: [secret])
    log.info("event.settled", settlement="confirm", duration_secs=0.5, timestamps=2, error_message=f"it is {secret}!")
    for name in (b"duration_secs", b"settlement", b"event.settled", b"timestamp"):
        assert name in output.bytes
    assert b"it is [secret]!" in output.bytes


@pytest.mark.parametrize("value", [12345678, Path("/srv/12345678"), {"inner": ["12345678"]}, ("12345678",)])
def test_a_secret_in_a_value_of_any_kind_is_hidden(output, value):
    for log_format in ("json", "console"):
        output.logger(log_format=log_format, secrets=lambda: ["12345678"]).info("event.settled", value=value)
    assert b"12345678" not in output.bytes
    assert output.bytes.count(b"[secret]") == 2


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_short_secrets_make_no_line_longer_than_the_limit(output, log_format):
    log = output.logger(log_format=log_format, secrets=lambda: ["x"])
    log.info("event.settled", error_message="x" * 15_000)
    assert len(output.bytes) <= LINE_MAX_BYTES


def test_a_secret_that_changes_is_hidden_from_then_on(output):
    secrets = ["first-value"]
    log = output.logger(secrets=lambda: secrets)
    secrets[:] = ["second-value"]
    log.info("event.settled", error_message="second-value")
    assert output.lines[0]["error_message"] == "[secret]"


# --- priorities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_lines_have_a_priority_if_the_stream_is_journald(output, log_format):
    log = output.logger(log_format=log_format, journald_stream=journald_stream_of(output.stream))
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)("daemon.started")
    assert re.findall(rb"(?m)^<(\d)>", output.bytes) == [b"7", b"6", b"4", b"3"]


@pytest.mark.parametrize("journald_stream", ["", "0:0", "nonsense", "8:1"])
def test_lines_have_no_priority_on_any_other_stream(output, journald_stream):
    output.logger(journald_stream=journald_stream).info("daemon.started")
    assert output.bytes.startswith(b"{")


def test_a_stream_without_a_descriptor_is_not_journald():
    stream = StringIO()
    make_logger(stream, log_format="json", journald_stream="8:1").info("daemon.started")
    assert stream.getvalue().startswith("{")


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_closed_pipe_raises_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as stream:
        make_logger(stream, log_format="json").info("daemon.started")


def test_lines_of_many_threads_are_whole(output):
    log = output.logger()

    def write(number):
        for turn in range(50):
            log.info("event.settled", thread=number, turn=turn, text="x" * 5000)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert {(line["thread"], line["turn"]) for line in output.lines} == {(n, t) for n in range(4) for t in range(50)}


def test_a_pipe_that_takes_a_piece_at_a_time_gets_the_whole_line():
    reading, writing = os.pipe()
    received = []

    def read():
        while data := os.read(reading, 7000):
            received.append(data)
            time.sleep(0.001)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(writing, "w") as stream:
        for _ in range(20):
            LineLogger(stream).msg(b"x" * 16_000 + b"\n")
    reader.join(10)
    os.close(reading)
    assert b"".join(received) == (b"x" * 16_000 + b"\n") * 20


# --- without a reader -------------------------------------------------------------------------------------------------


def pipe_pair():
    return os.pipe()


def socket_pair():
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return theirs.detach(), ours.detach()


def read_lines(fd, *, until_event):
    """Read and parse lines from the pipe up to the first one of this event. Fails if a line is not whole."""
    data, found = b"", []
    while not found or found[-1]["event"] != until_event:
        data += os.read(fd, 1 << 16)
        *whole, data = data.split(b"\n")
        found += map(json.loads, whole)
    assert data == b""
    return found


@pytest.fixture(params=[pipe_pair, socket_pair])
def unread(request):
    """A logger on a pipe or socket that nothing reads: (logger, descriptor to read, descriptor to write)."""
    reading, writing = request.param()
    with os.fdopen(writing, "w") as stream:
        yield make_logger(stream, level="debug", log_format="json"), reading, writing
    os.close(reading)


def fill(log, number, size):
    durations = []
    for turn in range(number):
        began = time.monotonic()
        log.info("event.settled", turn=turn, text="x" * size)
        durations.append(time.monotonic() - began)
    return durations


@pytest.mark.system
@pytest.mark.parametrize("size", [300, 9000])
def test_without_a_reader_one_line_waits_and_others_are_dropped(unread, size):
    log, reading, _ = unread
    durations = fill(log, 1500, size)
    slow = [secs for secs in durations if secs > 0.5]
    assert len(slow) == 1
    assert slow[0] < 5
    assert sum(durations) < 10

    found = read_lines(reading, until_event="log.dropped")
    dropped = found[-1]["dropped_lines"]
    assert found[-1]["level"] == "warning"
    assert [line["turn"] for line in found[:-1]] == list(range(1500 - dropped))
    log.info("daemon.stopped")
    assert read_lines(reading, until_event="daemon.stopped")[-1]["event"] == "daemon.stopped"


@pytest.mark.system
def test_lines_of_many_threads_stay_whole_while_others_are_dropped(unread):
    log, reading, _ = unread
    threads = [threading.Thread(target=fill, args=(log, 400, 700)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    log.info("event.settled", turn=-1)
    settled = read_lines(reading, until_event="log.dropped")
    assert len(settled) - 1 + settled[-1]["dropped_lines"] == 1201


def test_a_shared_descriptor_stays_blocking(unread):
    log, _, writing = unread
    fill(log, 3, 10)
    assert os.get_blocking(writing)


@pytest.mark.parametrize("trouble", ["reader gone", "no reader yet"])
def test_a_named_pipe_reports_dropped_lines_to_its_next_reader(tmp_path, trouble):
    os.mkfifo(tmp_path / "fifo")
    reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with (tmp_path / "fifo").open("w") as stream:
        log = make_logger(stream, log_format="json")
        if trouble == "reader gone":
            log.info("daemon.started")
            assert os.read(reading, 1 << 16)
        os.close(reading)
        fill(log, 4, 10)
        reading = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        log.info("daemon.stopped")
        found = read_lines(reading, until_event="daemon.stopped")
        os.close(reading)
    assert [(line["event"], line.get("turn"), line.get("dropped_lines")) for line in found] == [
        ("event.settled", 0, None),
        ("log.dropped", None, 3),
        ("daemon.stopped", None, None),
    ]


# --- libraries --------------------------------------------------------------------------------------------------------


def test_libraries_lines_and_warnings_have_our_form(output):
    output.logger(level="info")
    logging.getLogger("urllib3.pool").warning("retrying %s", "soon")
    logging.getLogger("urllib3.pool").debug("too much")
    logging.getLogger("some.lib").critical("very bad")
    warnings.warn("old habits", DeprecationWarning, stacklevel=1)
    assert [(line["event"], line["level"], line["logger"]) for line in output.lines] == [
        ("library.logged", "warning", "urllib3.pool"),
        ("library.logged", "error", "some.lib"),
        ("library.logged", "warning", "py.warnings"),
    ]
    assert output.lines[0]["message"] == "retrying soon"
    assert "old habits" in output.lines[2]["message"]


def test_a_library_s_exception_is_in_its_line(output):
    output.logger()
    try:
        int("why")
    except ValueError:
        logging.getLogger("some.lib").exception("failed")
    assert "ValueError: invalid" in output.lines[0]["exception"]


def test_a_wrong_logging_call_of_a_library_is_still_logged(output, capsys):
    output.logger()
    record = logging.LogRecord("some.lib", logging.ERROR, "path", 1, "%d and %d", ("one",), None)
    logging.getLogger().handlers[-1].emit(record)
    assert "%d and %d" in output.lines[0]["message"]
    assert capsys.readouterr().err == ""


def test_a_custom_level_of_a_library_is_logged_as_info(output):
    output.logger()
    logging.addLevelName(35, "NOTICE")
    logging.getLogger("some.lib").log(35, "look")
    assert [(line["level"], line["message"]) for line in output.lines] == [("info", "look")]


def test_a_second_logger_replaces_the_first_for_libraries(output):
    output.logger()
    output.logger()
    logging.getLogger("some.lib").error("once")
    assert len(output.lines) == 1


# --- repeats ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def repeats(log, clock):
    return RepeatLimiter(log, window_secs=300.0, monotonic=clock)


def test_the_same_cause_is_logged_once_then_counted(repeats, lines, clock):
    written = [repeats.log_once("warning", "pull.failed", cause="down", attempt=number) for number in range(5)]
    assert written == [True, False, False, False, False]
    assert lines == [{"event": "pull.failed", "level": "warning", "attempt": 0}]
    clock.advance(300)
    repeats.log_once("warning", "pull.failed", cause="down", attempt=9)
    assert lines[1:] == [{"event": "pull.failed", "level": "warning", "attempt": 9, "suppressed_lines": 4}]


def test_another_cause_is_logged(repeats, lines):
    repeats.log_once("warning", "pull.failed", cause="a")
    repeats.log_once("error", "pull.failed", cause="b")
    assert [line["level"] for line in lines] == ["warning", "error"]


def test_a_forgotten_cause_returns_its_count_and_is_logged_again(repeats, lines):
    for cause in ("a 1", "a 1", "a 1", "a 2", "b"):
        repeats.log_once("warning", "pull.failed", cause=cause)
    assert repeats.reset("a") == 2
    assert repeats.reset("a") is None
    repeats.log_once("warning", "pull.failed", cause="a 1")
    repeats.log_once("warning", "pull.failed", cause="b")
    assert len(lines) == 4


@pytest.mark.system
@pytest.mark.long
def test_very_many_causes_do_not_fill_the_memory(repeats, lines):
    tracemalloc.start()
    try:
        for number in range(20_000):
            repeats.log_once("warning", "pull.failed", cause=f"request {number:0100}")
        lines.clear()
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000


def test_very_long_causes_do_not_fill_the_memory(repeats, lines):
    tracemalloc.start()
    try:
        for number in range(20):
            cause = "sink " + "x" * 1_000_000 + str(number)
            assert repeats.log_once("warning", "pull.failed", cause=cause)
            assert not repeats.log_once("warning", "pull.failed", cause=cause)
        del cause
        kept_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept_bytes < 1_000_000
    assert repeats.reset("sink ") == 20


def test_many_threads_log_the_same_cause_once(lines, log):
    repeats = RepeatLimiter(log)
    threads = [
        threading.Thread(target=repeats.log_once, args=("warning", "pull.failed"), kwargs={"cause": "x"})
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(lines) == 1
    assert repeats.reset("x") == 19


# --- the catalogue ----------------------------------------------------------------------------------------------------

METHODS = {"debug", "info", "warning", "error", "critical", "exception"}


def logged_names():
    """Every log call of our code: (name of the event, or None if it is not a literal; place)."""
    root = Path(vodpoller.__file__).parent
    for path in sorted(root.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
                continue
            place = f"{path.relative_to(root)}:{call.lineno}"
            if call.func.attr in METHODS and ast.unparse(call.func.value).lower().endswith("log"):
                yield _literal(call.args[0]) if call.args else None, place
            elif call.func.attr in ("log_once", "repeated") and isinstance(call.args[1], ast.Constant):
                yield _literal(call.args[1]), place


def _literal(node):
    return node.value if isinstance(node, ast.Constant) else None


def test_the_catalogue_has_every_event_that_is_logged_and_no_other():
    places = dict(logged_names())
    logged_elsewhere = {"library.logged", "log.dropped"}
    assert [(name, place) for name, place in places.items() if name not in CATALOGUE] == []
    assert set(CATALOGUE) - set(places) - logged_elsewhere == set()


@pytest.mark.parametrize("name", CATALOGUE)
def test_names_are_two_words_joined_by_a_dot(name):
    assert re.fullmatch(r"[a-z]+\.[a-z]+", name)
    assert CATALOGUE[name]


def test_the_test_logger_logs_as_the_real_one_does():
    lines = []
    log_into(lines, level="info").debug("daemon.started")
    log_into(lines).info("daemon.started", source="main")
    assert named(lines, "daemon.started") == [{"event": "daemon.started", "level": "info", "source": "main"}]


# --- the lines of a batch ---------------------------------------------------------------------------------------------


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    with open(writing, "w", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor
        yield stream, lambda: _read_available(reading)
    os.close(reading)


def _read_available(fd):
    try:
        return os.read(fd, 1 << 20)
    except BlockingIOError:
        return b""


def test_the_lines_of_a_batch_are_written_in_one_write(pipe, monkeypatch):
    stream, _ = pipe
    written = []
    monkeypatch.setattr(Outlet, "write_some", lambda _outlet, data, _secs: written.append(data) or len(data))
    scope = Telemetry(make_logger(stream, log_format="json")).scope()
    scope.settled([{"number": number} for number in range(3)])
    scope.settled([])
    (data,) = written
    assert [json.loads(line)["number"] for line in data.splitlines()] == [0, 1, 2]
    assert {json.loads(line)["event"] for line in data.splitlines()} == {"event.settled"}


def test_each_line_of_a_batch_is_redacted_and_cut_separately(pipe):
    stream, read = pipe
    log = make_logger(stream, log_format="json", secrets=lambda: ["a long secret"])
    Telemetry(log).scope().settled([{"why": "a long secret"}, {"why": "x" * 20_000}, {"why": "a word"}])
    secret, long, plain = (json.loads(line) for line in read().splitlines())
    assert (secret["why"], plain["why"]) == ("[secret]", "a word")
    assert long["truncated"] is True
    assert "truncated" not in secret | plain


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_lines_of_a_batch_have_the_form_of_single_ones(pipe, log_format):
    stream, read = pipe
    log = make_logger(stream, log_format=log_format)
    log.info("event.settled", number=7)
    Telemetry(log).scope().settled([{"number": 7}])
    single, one_of_several = (re.sub(rb"\d{4}-\d\d-\d\dT[\d:.]+Z", b"", line) for line in read().splitlines())
    assert single == one_of_several
    assert b"7" in single


def test_lines_of_a_batch_below_the_level_are_not_written(pipe):
    stream, read = pipe
    Telemetry(make_logger(stream, level="warning", log_format="json")).scope().settled([{"number": 1}])
    assert read() == b""
