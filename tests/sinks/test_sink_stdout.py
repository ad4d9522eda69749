import os
import threading

import pytest

from tests.helpers import sink_context
from vodpoller.errors import ConfigError, PartialFailureError, TransientError
from vodpoller.events.event import make_event
from vodpoller.sinks.stdout import StdoutConfig, StdoutSink


class Stream:
    def __init__(self, fd):
        self.fd = fd

    def fileno(self):
        return self.fd


def event(number, size=0):
    return make_event({"EventType": "T", "Number": number, "Text": "x" * size}, source="main", sub_app_id=None)


def line(*args):
    return event(*args).body + b"\n"


@pytest.fixture
def pipe():
    reading, writing = os.pipe()
    ends = [reading, writing]
    yield ends
    for end in ends:
        os.close(end)


def sink_for(fd):
    return StdoutSink("out", StdoutConfig(type="stdout"), sink_context(), stream=Stream(fd))


def read_exactly(fd, count):
    data = b""
    while len(data) < count:
        data += os.read(fd, count - len(data))
    return data


def test_a_closed_standard_output_is_a_config_error(pipe):
    fd = os.dup(pipe[1])
    os.close(fd)
    with pytest.raises(ConfigError, match=r"sinks\.out: standard output is closed"):
        sink_for(fd)


def test_a_reader_that_ended_is_a_transient_error(pipe):
    sink = sink_for(pipe[1])
    os.close(pipe.pop(0))
    with pytest.raises(TransientError, match="has its reader ended"):
        sink.deliver([event(1)], 1.0)


def test_complete_lines_are_accepted_and_a_torn_one_is_completed(pipe):
    reading, writing = pipe
    sink = sink_for(writing)
    with pytest.raises(PartialFailureError) as excinfo:
        sink.deliver([event(1, 30_000), event(2, 60_000), event(3)], 0.2)
    assert sorted(excinfo.value.failures) == [1, 2]
    assert all(isinstance(error, TransientError) for error in excinfo.value.failures.values())
    with pytest.raises(TransientError, match="does not read"):
        sink.deliver([event(4)], 0.2)
    expected = line(1, 30_000) + line(2, 60_000) + line(2, 60_000) + line(3)
    got = []
    reader = threading.Thread(target=lambda: got.append(read_exactly(reading, len(expected))))
    reader.start()
    sink.deliver([event(2, 60_000), event(3)], 10.0)
    reader.join()
    assert got == [expected]


def test_closing_the_sink_leaves_standard_output_open(pipe):
    reading, writing = pipe
    sink = sink_for(writing)
    sink.close()
    os.write(writing, b"still open")
    assert os.read(reading, 100) == b"still open"


def test_closing_ends_a_call_that_waits_for_the_reader(pipe):
    sink = sink_for(pipe[1])
    with pytest.raises(TransientError, match="does not read"):
        sink.deliver([event(1, 1 << 20)], 0.1)
    errors = []

    def deliver():
        with pytest.raises(TransientError) as excinfo:
            sink.deliver([event(2)], 60.0)
        errors.append(str(excinfo.value))

    thread = threading.Thread(target=deliver)
    thread.start()
    sink.close()
    thread.join(10)
    assert errors == ["standard output: the sink is closed"]


def test_a_descriptor_that_is_open_for_reading_only_is_a_config_error(pipe):
    with pytest.raises(ConfigError, match=r"sinks\.out: standard output is open for reading only"):
        sink_for(pipe[0])


def test_a_file_gets_a_call_in_one_write(tmp_path, monkeypatch):
    with (tmp_path / "out").open("wb") as file:
        sink = sink_for(file.fileno())
        sizes = []
        write = os.write
        monkeypatch.setattr(os, "write", lambda fd, data: sizes.append(len(data)) or write(fd, data))
        sink.deliver([event(1, 30_000), event(2)], 5.0)
        monkeypatch.undo()
    assert sizes == [len(line(1, 30_000) + line(2))]
    assert (tmp_path / "out").read_bytes() == line(1, 30_000) + line(2)


def test_standard_output_itself_is_the_default(capfd):
    StdoutSink("out", StdoutConfig(type="stdout"), sink_context()).deliver([event(1)], 5.0)
    assert capfd.readouterr().out == line(1).decode()


def test_two_sinks_cannot_share_standard_output():
    assert StdoutConfig(type="stdout").claims() == {"stdout"}
