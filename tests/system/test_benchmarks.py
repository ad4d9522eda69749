"""The benchmark is not a test; these tests only check that its command works."""

import subprocess
import sys

import pytest

from tests.benchmarks.__main__ import main
from tests.processes import ROOT, environment

pytestmark = pytest.mark.long


def run_benchmarks(*args):
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env=environment(),
    )


@pytest.fixture
def refusal_of(monkeypatch, capsys):
    """Runs the command with arguments that it refuses; returns its stderr."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["benchmarks", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        return capsys.readouterr().err

    return run


def test_an_unknown_row_is_refused_with_the_names_of_all_rows(refusal_of):
    stderr = refusal_of("--rows", "nonsense")
    assert "'nonsense' is not a row" in stderr
    assert "paced" in stderr


@pytest.mark.parametrize("program", ["no/such/program", "README.md"])
def test_a_baseline_that_is_not_a_program_is_refused(refusal_of, program):
    assert f"{program} is not a program" in refusal_of("--baseline", program)


@pytest.fixture
def other_version(tmp_path):
    """A program that stands for another version; it runs this version."""
    program = tmp_path / "vodpoller"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m vodpoller "$@"\n')
    program.chmod(0o755)
    return program


def test_the_rows_of_stored_events_also_measure_the_baseline(other_version):
    ended = run_benchmarks("--quick", "--rows", "backlog,recover", "--baseline", other_version)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| vodpoller")]
    assert [line[0] for line in lines] == ["| vodpoller", "| vodpoller, baseline"] * 2
    assert [line[4] for line in lines[:2]] == ["0", "0"]  # sent twice
    assert lines[1][5:] == ["1.00", "1.00 |"]


def test_the_row_of_a_large_journal_has_seconds_for_each_step():
    ended = run_benchmarks("--quick", "--rows", "stored")
    assert ended.returncode == 0, ended.stderr
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("| vodpoller")]
    assert all(float(secs) > 0 for secs in line.strip("| ").split(" | ")[1:])


def test_the_row_of_confirms_prints_ratios_to_the_baseline(other_version):
    ended = run_benchmarks("--quick", "--rows", "confirm", "--secs", "1", "--baseline", other_version)
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| vodpoller")]
    labels = ["run 1", "baseline, run 1", "all runs", "baseline, all runs"]
    assert [line[0] for line in lines] == [f"| vodpoller, {label}" for label in labels] * 3
    assert [line[4:6] for line in lines[1::4]] == [["-", "-"]] * 3
    assert [line[4:6] for line in lines[3::4]] == [["1.00", "1.00"]] * 3
    assert all(float(line[4]) > 0 for line in lines[2::4])


def test_a_row_prints_the_machine_and_a_line_for_each_consumer():
    ended = run_benchmarks("--quick", "--rows", "zero", "--secs", "2")
    assert ended.returncode == 0, ended.stderr
    assert "tencentcloud-sdk-python-common" in ended.stdout
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| vodpoller", "| SDK loop", "| SDK loop, 16 threads"]
    assert {len(line) for line in lines} == {len(lines[0])}
    events_per_sec = [float(line[1].replace(",", "")) for line in lines[2:]]
    assert min(events_per_sec) > 0


def test_the_row_of_callbacks_has_a_line_per_number_of_connections():
    ended = run_benchmarks("--quick", "--rows", "callbacks")
    assert ended.returncode == 0, ended.stderr
    lines = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")][2:]
    assert [line[0] for line in lines] == ["1", "8"]
    assert all(float(line[1].replace(",", "")) > 0 for line in lines)


def test_the_row_of_postgresql_compares_a_table_with_the_loop():
    ended = run_benchmarks("--quick", "--rows", "postgresql", "--secs", "2")
    assert ended.returncode == 0, ended.stderr
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| vodpoller", "| SDK loop, INSERT and COMMIT for each event"]
    assert min(float(line[1].replace(",", "")) for line in lines[2:]) > 0


def test_the_row_of_calls_compares_with_a_requests_session():
    ended = run_benchmarks("--quick", "--rows", "http", "--secs", "0.1")
    assert ended.returncode == 0, ended.stderr
    lines = [line.strip("| ").split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")][2:]
    assert [line[0] for line in lines] == ["vodpoller", "requests.Session"]
    assert lines[1][2] == "1.00"
    assert all(float(line[1].replace(",", "")) > 0 for line in lines)
