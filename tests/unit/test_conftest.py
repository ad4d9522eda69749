"""What conftest.py and processes.py promise about tests: which start processes, and which may be skipped."""

import os
import subprocess

import pytest
from hypothesis import settings

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
    """A fixture whose name makes conftest.py mark the tests that use it."""


@pytest.fixture
def system():
    """Another such name."""


@pytest.mark.usefixtures("certificate")
def test_a_fixture_that_starts_processes_gives_the_mark(request):
    assert request.node.get_closest_marker("system")


@pytest.mark.usefixtures("system")
def test_another_such_fixture_gives_the_mark(request):
    assert request.node.get_closest_marker("system")


def test_a_test_has_no_mark_by_default(request):
    assert request.node.get_closest_marker("system") is None


@pytest.mark.system
@pytest.mark.parametrize("command", [["true"], ["sh", "-c", "exit 0"]], ids=" ".join)
def test_a_test_with_the_mark_can_start_a_process(command):
    assert subprocess.run(command, check=False).returncode == 0


@pytest.mark.parametrize(("ci", "ends"), [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
@pytest.mark.parametrize("call", [lambda: needs(MISSING), lambda: cannot_run(f"no {MISSING}")], ids=["needs", "cannot"])
def test_what_a_laptop_skips_fails_in_ci(monkeypatch, ci, ends, call):
    monkeypatch.setenv("CI", ci)
    with pytest.raises(ends, match=MISSING):
        call()


def test_an_installed_program_neither_skips_nor_fails_a_test(monkeypatch):
    monkeypatch.setenv("CI", "true")
    needs("sh")


def test_no_module_replaces_the_profile_of_hypothesis(request):
    assert settings.get_current_profile_name() == (request.config.getoption("hypothesis_profile") or "quick")
