"""What conftest.py and processes.py promise about tests: which start processes, and which may be skipped."""

import os
import subprocess

import pytest

from tests.processes import cannot_run, needs

MISSING = "a-program-that-is-not-installed-anywhere"


@pytest.mark.parametrize(
    "start",
    [
        lambda: subprocess.run(["true"], check=True),
        lambda: os.posix_spawn("/bin/true", ["true"], {}),
        lambda: os.system("true"),
    ],
    ids=["run", "posix_spawn", "system"],
)
def test_a_test_without_the_mark_cannot_start_a_process(start):
    with pytest.raises(RuntimeError, match=r"pytest\.mark\.system"):
        start()


@pytest.fixture
def certificate():
    """A name that conftest.py knows."""


@pytest.fixture
def system():
    """Another one."""


@pytest.mark.usefixtures("certificate")
def test_a_test_has_the_mark_by_a_fixture_that_starts_processes(request):
    assert request.node.get_closest_marker("system")


@pytest.mark.usefixtures("system")
def test_a_test_has_the_mark_by_another_such_fixture(request):
    assert request.node.get_closest_marker("system")


def test_a_test_has_no_mark_by_itself(request):
    assert request.node.get_closest_marker("system") is None


@pytest.mark.system
@pytest.mark.parametrize("command", [["true"], ["sh", "-c", "exit 0"]], ids=" ".join)
def test_a_test_with_the_mark_can(command):
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(("ci", "ends"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
@pytest.mark.parametrize("call", [lambda: needs(MISSING), lambda: cannot_run(f"no {MISSING}")], ids=["needs", "cannot"])
def test_what_a_laptop_skips_fails_in_ci(monkeypatch, ci, ends, call):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(ends, match=MISSING):
        call()


def test_a_program_that_is_there_ends_nothing(monkeypatch):
    monkeypatch.setenv("CI", "true")
    needs("sh")
