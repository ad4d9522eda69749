import errno
import os
import shlex
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from tests.helpers import sink_context
from tests.polling import until
from vodpoller.errors import ConfigError, RejectedError, TransientError
from vodpoller.events.event import make_event, restore_event
from vodpoller.sinks.exec import ExecConfig, ExecSink

SLACK_SECS = 1.5
SH = "/bin/sh"


def event(number=1, *, sub_app_id=None, **more):
    content = {"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(number), "TaskId": "t-1"}, **more}
    return make_event(content, source="main", sub_app_id=sub_app_id)


@pytest.fixture
def opened():
    """Makes the sink for a command, or for a shell script with arguments."""
    sinks = []

    def open_it(command=None, *, script=None, args=(), environ=None, **more):
        command = command or [SH, "-c", script, "script", *map(str, args)]
        sinks.append(
            ExecSink("script", ExecConfig(type="exec", command=command, **more), sink_context(), environ=environ)
        )
        return sinks[-1]

    yield open_it
    for sink in sinks:
        sink.close()


def failure_of(sink, kind=TransientError, timeout_secs=10.0, sent=None):
    with pytest.raises(kind) as excinfo:
        sink.deliver([sent or event()], timeout_secs)
    return str(excinfo.value)


def is_alive(pid):
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pid_in(path):
    until(lambda: path.exists() and path.read_text().endswith("\n"))
    return int(path.read_text())


def variables(path):
    return dict(line.split(b"=", 1) for line in path.read_bytes().split(b"\0") if line)


# --- configuration ---


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("command", []),
        ("command", [""]),
        ("command", "true"),
        ("command", ["true", 5]),
        ("command", ["true", "nul\0"]),
        ("timeout_secs", 0.09),
        ("timeout_secs", 3601),
        ("concurrency", 0),
        ("concurrency", 65),
        ("env", {"": "empty"}),
        ("env", {"A=B": "sign"}),
        ("env", {"A\0": "nul"}),
        ("env", {"VODPOLLER_KEY": "mine"}),
        ("env", {"A": 5}),
        ("cwd", ""),
        ("cwd", "nul\0"),
        ("shell", True),
    ],
)
def test_values_that_cannot_be_used_are_refused(key, value):
    with pytest.raises(ValidationError) as excinfo:
        ExecConfig(**{"type": "exec", "command": ["true"], key: value})
    assert {error["loc"][0] for error in excinfo.value.errors()} == {key}


def test_the_defaults_are_those_that_are_documented():
    config = ExecConfig(type="exec", command=["true"])
    assert (config.timeout_secs, config.concurrency, config.env, config.cwd) == (30, 4, {}, None)


def test_the_values_of_variables_are_not_shown():
    with pytest.raises(ValidationError) as excinfo:
        ExecConfig(type="exec", command=["true"], env={"TOKEN": "hunter2\0"})
    assert "hunter2" not in str(excinfo.value)
    assert "hunter2" not in repr(ExecConfig(type="exec", command=["true"], env={"TOKEN": "hunter2"}))


# --- opening ---


def test_a_program_that_is_not_on_path_is_a_config_error(opened):
    with pytest.raises(ConfigError) as excinfo:
        opened(["no-such-program-anywhere"])
    (problem,) = excinfo.value.problems
    assert problem.startswith("sinks.script.command: no program no-such-program-anywhere ")
    assert problem.endswith("(install it, or give its path)")


def test_a_file_that_is_not_executable_is_an_error_with_a_remedy(opened, tmp_path):
    program = tmp_path / "handler"
    program.write_text("#!/bin/sh\n")
    for command, words in (([str(program)], "cannot be executed (make it executable for this user: chmod +x)"),):
        with pytest.raises(ConfigError) as excinfo:
            opened(command)
        assert excinfo.value.problems == (f"sinks.script.command: {program} {words}",)


@pytest.mark.parametrize("program", ["/no/such/file", "./no-such-file"])
def test_a_path_that_does_not_exist_is_a_config_error(opened, program):
    with pytest.raises(ConfigError, match=r"does not exist \(is the path right\?\)"):
        opened([program])


def test_a_folder_is_not_a_program(opened, tmp_path):
    with pytest.raises(ConfigError, match="cannot be executed"):
        opened([str(tmp_path)])


@pytest.mark.parametrize("place", ["missing", "file"])
def test_a_cwd_that_is_not_a_folder_is_a_config_error(opened, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError) as excinfo:
        opened(["true"], cwd=str(tmp_path / place))
    (problem,) = excinfo.value.problems
    assert problem.startswith(f"sinks.script.cwd: {tmp_path / place} is not a folder (")


def test_a_cwd_that_this_user_may_not_enter_is_a_config_error(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ConfigError, match=r"sinks\.script\.cwd: .* cannot be entered"):
        opened([SH], cwd=str(tmp_path))


def a_program(folder, text):
    path = folder / "handler"
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("by", ["inherited", "configured"])
def test_a_program_is_looked_up_on_the_path_that_it_gets(opened, tmp_path, by):
    a_program(tmp_path, f"#!{SH}\nexit 3\n")
    if by == "inherited":
        sink = opened(["handler"], environ={"PATH": f"/nowhere:{tmp_path}"})
    else:
        sink = opened(["handler"], environ={"PATH": "/nowhere"}, env={"PATH": str(tmp_path)})
    assert failure_of(sink, RejectedError) == f"{tmp_path}/handler exited with 3"


def test_a_relative_path_starts_at_cwd_where_the_command_runs(opened, tmp_path):
    a_program(tmp_path, f"#!{SH}\npwd >place\n")
    opened(["./handler"], cwd=str(tmp_path)).deliver([event()], 10.0)
    assert (tmp_path / "place").read_text() == f"{tmp_path}\n"


# --- what the command gets ---


def test_arguments_are_passed_as_they_are_without_a_shell(opened, tmp_path):
    code = "import json, os, sys; json.dump(sys.argv[2:], open(sys.argv[1], 'w'))"
    args = ["$HOME", "; exit 1", "a  b", "*", "", "雪"]
    opened([sys.executable, "-I", "-S", "-c", code, str(tmp_path / "args"), *args]).deliver([event()], 20.0)
    assert (tmp_path / "args").read_text() == '["$HOME", "; exit 1", "a  b", "*", "", "\\u96ea"]'


def test_the_body_is_on_stdin_and_the_ids_are_in_the_environment(opened, tmp_path):
    script = 'cat >"$1/body"; cat /proc/self/environ >"$1/environ"'
    opened(script=script, args=[tmp_path]).deliver([event(7)], 10.0)
    assert (tmp_path / "body").read_bytes() == event(7).body
    own = {name: value for name, value in variables(tmp_path / "environ").items() if name.startswith(b"VODPOLLER_")}
    assert own == {
        b"VODPOLLER_KEY": event(7).key.hex().encode(),
        b"VODPOLLER_EVENT_TYPE": b"NewFileUpload",
        b"VODPOLLER_TASK_ID": b"t-1",
        b"VODPOLLER_FILE_ID": b"7",
        b"VODPOLLER_SOURCE": b"main",
    }


def test_an_event_without_ids_gives_empty_variables(opened, tmp_path):
    unreadable = restore_event(body=b"{broken", key=b"\1" * 32, event_type="", source="main", sub_app_id=None)
    sink = opened(script='cat >"$1/body"; echo "$VODPOLLER_EVENT_TYPE,$VODPOLLER_FILE_ID" >"$1/ids"', args=[tmp_path])
    sink.deliver([unreadable], 10.0)
    assert (tmp_path / "body").read_bytes() == b"{broken"
    assert (tmp_path / "ids").read_text() == ",\n"


@pytest.mark.parametrize(
    ("event_type", "variable"),
    [
        ("nul\0inside", b"nul\\x00inside"),
        ("half a pair \ud83c", b"half a pair \\ud83c"),
        ("two\nlines = 雪", "two\nlines = 雪".encode()),
        ("雪" * 100_000, "雪".encode() * 1365),
    ],
    ids=["NUL", "lone surrogate", "line end", "long"],
)
def test_an_id_that_no_environment_can_hold_is_escaped_or_cut(opened, tmp_path, event_type, variable):
    sent = event(EventType=event_type)
    opened(script='cat /proc/self/environ >"$1/environ"', args=[tmp_path]).deliver([sent], 10.0)
    assert variables(tmp_path / "environ")[b"VODPOLLER_EVENT_TYPE"] == variable


def test_a_command_inherits_only_the_variables_that_it_needs(opened, tmp_path):
    kept = {"PATH": os.environ["PATH"], "HOME": "/root", "LANG": "C.UTF-8", "LC_TIME": "C", "TZ": "UTC", "TMPDIR": "/x"}
    dropped = {
        "NOTIFY_SOCKET": "/run/systemd/notify",
        "CREDENTIALS_DIRECTORY": "/run/credentials",
        "TENCENTCLOUD_SECRET_KEY": "hunter2",
        "WATCHDOG_PID": "1",
        "PYTHONPATH": "/y",
    }
    script = '[ ! -e "$1/environ" ] && cat /proc/$$/environ >"$1/environ"'
    sink = opened(
        script=script, args=[tmp_path], environ={**kept, **dropped}, env={"TOKEN": "of 雪", "TZ": "Asia/Tokyo"}
    )
    sink.deliver([event()], 10.0)
    found = {name.decode(): value.decode() for name, value in variables(tmp_path / "environ").items()}
    assert {name: value for name, value in found.items() if not name.startswith("VODPOLLER_")} == {
        **kept,
        "TZ": "Asia/Tokyo",
        "TOKEN": "of 雪",
    }


def test_a_command_inherits_only_the_standard_streams(opened, tmp_path):
    with (tmp_path / "secret").open("w") as secret:
        os.set_inheritable(secret.fileno(), True)  # noqa: FBT003 - it takes no keywords
        opened(script='ls -l /proc/$$/fd >"$1/fds"', args=[tmp_path]).deliver([event()], 10.0)
    assert str(tmp_path / "secret") not in (tmp_path / "fds").read_text()


def test_the_format_is_that_of_the_configuration(opened, tmp_path):
    opened(script='cat >"$1/body"', args=[tmp_path], format="cloudevents").deliver([event()], 10.0)
    assert (tmp_path / "body").read_bytes().startswith(b'{"specversion":"1.0"')


# --- what its end means ---


@pytest.mark.parametrize(
    ("script", "kind", "expected"),
    [
        ("exit 1", RejectedError, "exited with 1"),
        ("exit 255", RejectedError, "exited with 255"),
        ("echo no such customer >&2; exit 2", RejectedError, "exited with 2: no such customer"),
        ("exit 75", TransientError, "exited with 75 (it asks for another attempt later)"),
        ("echo busy >&2; exit 75", TransientError, "exited with 75 (it asks for another attempt later): busy"),
        ("exit 126", TransientError, "exited with 126 (a program that it calls cannot be executed)"),
        ("exit 127", TransientError, "exited with 127 (a program that it calls was not found)"),
        ("kill -TERM $$", TransientError, "was killed by SIGTERM"),
        ("kill -KILL $$", TransientError, "was killed by SIGKILL (did memory run out?)"),
        ("echo oh >&2; kill -SEGV $$", TransientError, "was killed by SIGSEGV: oh"),
    ],
)
def test_an_exit_that_is_not_a_success_is_explained(opened, script, kind, expected):
    sink = opened(script=f"ulimit -c 0; {script}")
    with pytest.raises((RejectedError, TransientError)) as excinfo:
        sink.deliver([event()], 10.0)
    assert (type(excinfo.value), str(excinfo.value)) == (kind, f"{SH} {expected}")


def test_a_real_time_signal_has_a_number(opened):
    code = "import os; os.kill(os.getpid(), 40)"
    assert failure_of(opened([sys.executable, "-I", "-S", "-c", code])).endswith("was killed by signal 40")


@pytest.mark.parametrize("size", [10, 5_000_000])
@pytest.mark.parametrize(("code", "kind"), [(0, None), (3, RejectedError), (75, TransientError)])
def test_a_command_that_does_not_read_counts_by_its_exit_code(opened, size, code, kind):
    sink = opened(script=f"exec <&-; exit {code}")
    sent = event(Text="x" * size)
    if kind is None:
        sink.deliver([sent], 10.0)
    else:
        failure_of(sink, kind, sent=sent)


def test_a_command_may_write_much_before_it_reads(opened, tmp_path):
    sent = event(Text="0123456789abcdef" * (5 * 65_536))
    script = 'head -c 3000000 /dev/zero >&2; head -c 3000000 /dev/zero; cat >"$1/body"'
    opened(script=script, args=[tmp_path]).deliver([sent], 20.0)
    assert (tmp_path / "body").read_bytes() == sent.body


def test_the_reason_is_the_end_of_stderr_in_one_line(opened):
    script = "seq 1 100000 >&2; printf '\\033[31mred\\r\\n\\n  end\\377\\n' >&2; echo on stdout; exit 1"
    message = failure_of(opened(script=script), RejectedError)
    assert message.endswith(" | 99999 | 100000 | [31mred | end\ufffd")
    assert len(message) < 8192
    assert "stdout" not in message
    assert message.isprintable()


def test_stderr_of_a_command_takes_no_memory(opened):
    sink = opened(script="yes '0123456789 abcdefghij' | head -c 200000000 >&2; echo last >&2; exit 1")
    before = peak_bytes()
    assert failure_of(sink, RejectedError, timeout_secs=60.0).endswith("last")
    assert peak_bytes() - before < 20_000_000


def peak_bytes():
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("kept_bytes", [0, 3000, *range(4080, 4097, 2), 6000])
def test_variables_are_hidden_in_stderr_even_if_cut_in_two(opened, kept_bytes):
    dots = f'head -c {kept_bytes} /dev/zero | tr "\\0" .'
    script = f'{{ printf %s "begin $TOKEN"; {dots}; printf %s "$TOKEN"; }} >&2; exit 1'
    message = failure_of(opened(script=script, env={"TOKEN": "hunter2-hunter3", "VERBOSE": "1"}), RejectedError)
    assert message.startswith(f"{SH} exited with 1")
    assert not any(piece in message for piece in ("hunter", "unt", "ter3", "er3", "r3"))
    assert ("begin ***" in message) == (kept_bytes <= 3000)
    assert message.endswith("***")
    assert message.count(".") >= min(kept_bytes, 4000)


def test_a_long_hidden_value_does_not_make_the_reason_longer(opened):
    script = "head -c 9000 /dev/zero | tr '\\0' . >&2; exit 1"
    message = failure_of(opened(script=script, env={"TOKEN": "x" * 10_000}), RejectedError)
    assert message == f"{SH} exited with 1: {'.' * 4096}"


def test_a_program_that_was_removed_may_be_installed_again(opened, tmp_path):
    program = a_program(tmp_path, f"#!{SH}\nexit 0\n")
    sink = opened([str(program)])
    program.rename(tmp_path / "away")
    assert failure_of(sink).startswith(f"{program} cannot be started: No such file or directory (was it removed,")
    (tmp_path / "away").rename(program)
    sink.deliver([event()], 10.0)


def test_the_error_names_a_cwd_that_was_removed(opened, tmp_path):
    (tmp_path / "place").mkdir()
    sink = opened(["true"], cwd=str(tmp_path / "place"))
    (tmp_path / "place").rmdir()
    assert failure_of(sink).startswith(f"{tmp_path / 'place'} cannot be started: No such file")


def test_the_error_of_a_script_without_a_shebang_explains_it(opened, tmp_path):
    program = a_program(tmp_path, "exit 0\n")
    assert "Exec format error (a script's first line must be #!" in failure_of(opened([str(program)]))


def test_a_lack_of_memory_before_the_start_is_transient(opened, monkeypatch):
    def refuse(name):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "memfd_create", refuse)
    assert "cannot be started: Cannot allocate memory (not enough memory" in failure_of(opened(["true"]))


def test_a_lost_exit_code_is_never_a_success(opened):
    sink = opened(["true"])
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert "its exit code is lost" in failure_of(sink)
    finally:
        signal.signal(signal.SIGCHLD, before)
    sink.deliver([event()], 10.0)


# --- the time limit ---


def timed(sink, timeout_secs):
    began = time.monotonic()
    message = failure_of(sink, TransientError, timeout_secs)
    return message, time.monotonic() - began


FAMILY = """
    sleep 60 & echo $! >"$1/child"
    sh -c 'echo $$ >"$1/grandchild"; sleep 60; :' sh "$1" &
    echo $$ >"$1/parent"
"""


@pytest.mark.parametrize(
    "script",
    [
        f"{FAMILY} wait",
        f"trap '' TERM; {FAMILY} wait; wait; wait",
        f"trap 'exit 0' TERM; {FAMILY} wait",
        f"exec 2>/dev/null; {FAMILY} wait",
        f"{FAMILY} while :; do echo talks and talks >&2; done",
    ],
    ids=["obeys", "ignores", "succeeds late", "closed stderr", "talks"],
)
def test_a_command_that_is_too_slow_is_killed_with_its_children(opened, tmp_path, script):
    sink = opened(script=script, args=[tmp_path])
    message, took_secs = timed(sink, 0.8)
    assert message.startswith(f"{SH} did not end within 0.8 s and was killed")
    assert 0.7 < took_secs < 0.8 + SLACK_SECS
    pids = [pid_in(tmp_path / name) for name in ("parent", "child", "grandchild")]
    until(lambda: not any(map(is_alive, pids)))


def test_a_command_may_write_a_reason_after_sigterm(opened):
    script = "trap 'echo waited for the database >&2; exit 1' TERM; sleep 60 & wait"
    message, _ = timed(opened(script=script), 2.0)
    assert message == f"{SH} did not end within 2 s and was killed: waited for the database"


def test_a_child_has_time_after_sigterm_even_if_its_parent_ends(opened, tmp_path):
    child = 'trap \'sleep 0.05; echo >"$1/tidied"; exit\' TERM; echo >"$1/begun"; while :; do sleep 0.01; done'
    script = f'sh -c {shlex.quote(child)} sh "$1" & until [ -e "$1/begun" ]; do :; done; wait'
    timed(opened(script=script, args=[tmp_path]), 3.0)
    assert (tmp_path / "tidied").exists()


def test_a_command_runs_in_its_own_session(opened, tmp_path):
    opened(script='echo $$ $(cut -d " " -f 6 /proc/$$/stat) >"$1/ids"', args=[tmp_path]).deliver([event()], 10.0)
    pid, session = (tmp_path / "ids").read_text().split()
    assert pid == session


def test_a_background_child_is_not_waited_for(opened, tmp_path):
    script = 'sleep 60 & echo $! >"$1/child"; echo text >&2; exit 0'
    began = time.monotonic()
    opened(script=script, args=[tmp_path]).deliver([event()], 10.0)
    assert time.monotonic() - began < SLACK_SECS
    left = pid_in(tmp_path / "child")
    assert is_alive(left)
    os.kill(left, signal.SIGKILL)


def test_a_background_child_that_writes_is_not_waited_for(opened, tmp_path):
    script = '(echo $$ >"$1/child"; exec yes >&2) & until [ -e "$1/child" ]; do :; done; exit 1'
    began = time.monotonic()
    assert failure_of(opened(script=script, args=[tmp_path]), RejectedError).startswith(f"{SH} exited with 1")
    assert time.monotonic() - began < SLACK_SECS


def test_a_child_with_its_own_session_does_not_extend_the_limit(opened, tmp_path):
    code = (
        "import os, sys, time\n"
        "if os.fork() == 0:\n"
        "    os.setsid()\n"
        "    open(sys.argv[1], 'w').write(f'{os.getpid()}\\n')\n"
        "time.sleep(60)\n"
    )
    _, took_secs = timed(opened([sys.executable, "-I", "-S", "-c", code, str(tmp_path / "daemon")]), 1.0)
    assert took_secs < 1.0 + SLACK_SECS
    os.kill(pid_in(tmp_path / "daemon"), signal.SIGKILL)


def test_nothing_is_left_of_a_command_that_has_ended(opened, tmp_path):
    sink = opened(script='echo $$ >"$1/pid"; [ ! -e "$1/hang" ] || sleep 60', args=[tmp_path])
    sink.deliver([event()], 10.0)
    before = sorted(Path("/proc/self/fd").iterdir())
    pids = []
    for hangs in (False, True):
        if hangs:
            (tmp_path / "hang").touch()
            failure_of(sink, timeout_secs=0.2)
        else:
            sink.deliver([event()], 10.0)
        pids.append(pid_in(tmp_path / "pid"))
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


# --- several at once ---


def test_concurrent_commands_do_not_mix_input_and_stderr(opened, tmp_path):
    script = 'cat >"$1/$VODPOLLER_FILE_ID"; echo "about $VODPOLLER_FILE_ID" >&2; exit $((VODPOLLER_FILE_ID % 2))'
    sink = opened(script=script, args=[tmp_path], concurrency=16)

    def outcome(number):
        try:
            sink.deliver([event(number)], 30.0)
        except RejectedError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(16) as threads:
        outcomes = list(threads.map(outcome, range(200)))
    assert outcomes == [f"{SH} exited with 1: about {number}" if number % 2 else "" for number in range(200)]
    assert all((tmp_path / str(number)).read_bytes() == event(number).body for number in range(200))


def test_a_command_that_hangs_delays_no_other(opened, tmp_path):
    sink = opened(script='[ "$VODPOLLER_FILE_ID" != 0 ] || { echo $$ >"$1/pid"; exec sleep 60; }', args=[tmp_path])
    hanging = threading.Thread(target=failure_of, args=(sink, TransientError, 30.0, event(0)))
    hanging.start()
    pid_in(tmp_path / "pid")
    for number in range(1, 5):
        sink.deliver([event(number)], 10.0)
    assert hanging.is_alive()
    sink.close()
    hanging.join()


# --- closing ---


@pytest.mark.parametrize(
    "script",
    [f"{FAMILY} wait", f"trap '' TERM; {FAMILY} wait; wait; wait", f"trap 'exit 1' TERM; {FAMILY} wait"],
    ids=["obeys", "ignores", "fails"],
)
def test_closing_ends_running_commands_and_rejects_no_event(opened, tmp_path, script):
    sink = opened(script=script, args=[tmp_path])
    failures = []
    delivering = threading.Thread(target=lambda: failures.append(failure_of(sink, TransientError, 30.0)))
    delivering.start()
    pids = [pid_in(tmp_path / name) for name in ("child", "grandchild", "parent")]
    began = time.monotonic()
    sink.close()
    assert time.monotonic() - began < 1.0 + SLACK_SECS
    delivering.join(5)
    until(lambda: not any(map(is_alive, pids)))
    assert failures == [f"{SH} was stopped because the sink is closed"]


def test_a_closed_sink_starts_no_command(opened, tmp_path):
    sink = opened(script='trap "" TERM; echo $$ > $1/$$; while true; do sleep 1; done', args=[tmp_path], concurrency=16)
    barrier = threading.Barrier(9)

    def deliver(number):
        barrier.wait(10)
        with pytest.raises(TransientError, match="the sink is closed"):
            sink.deliver([event()], 60.0)

    threads = [threading.Thread(target=deliver, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait(10)
    sink.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert "the sink is closed" in failure_of(sink)
    assert not [path for path in tmp_path.iterdir() if is_alive(int(path.name))]


def test_a_command_that_had_ended_before_closing_keeps_its_success(opened):
    sink = opened(["true"])
    sink.deliver([event()], 10.0)
    sink.close()
    assert failure_of(sink).endswith("true: the sink is closed")


# --- probing ---


def test_a_probe_finds_the_program_without_starting_it(tmp_path):
    program = a_program(tmp_path, f"#!{SH}\ntouch {tmp_path}/started\n")
    config = ExecConfig(type="exec", command=[str(program)])
    assert ExecSink.probe("script", config, sink_context()) == f"{program} can be started"
    assert not (tmp_path / "started").exists()


@pytest.mark.parametrize("more", [{"command": ["no-such-program-anywhere"]}, {"cwd": "/no/such/folder"}])
def test_a_failed_probe_says_what_to_do(more):
    config = ExecConfig(**{"type": "exec", "command": ["true"], **more})
    with pytest.raises(ConfigError) as excinfo:
        ExecSink.probe("script", config, sink_context())
    (problem,) = excinfo.value.problems
    assert problem.startswith(f"sinks.script.{next(iter(more))}: ")
    assert problem.endswith(")")
