"""The benchmark is no test; this only keeps its command from rotting."""

import subprocess
import sys

import pytest

from tests.processes import ROOT, environment

pytestmark = pytest.mark.system


def run_benchmarks(*args):
    return subprocess.run(
        [sys.executable, "-m", "tests.benchmarks", *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=environment(),
    )


def test_a_row_that_does_not_exist_is_refused_with_the_names_of_those_that_do():
    ended = run_benchmarks("--rows", "nonsense")
    assert ended.returncode == 2
    assert "there is no row 'nonsense'" in ended.stderr
    assert "paced" in ended.stderr


def test_one_quick_row_prints_the_machine_and_a_table_with_a_line_for_each_consumer():
    ended = run_benchmarks("--quick", "--rows", "zero", "--secs", "0.3")
    assert ended.returncode == 0, ended.stderr
    assert "tencentcloud-sdk-python-common" in ended.stdout
    lines = [line.split(" | ") for line in ended.stdout.splitlines() if line.startswith("| ")]
    assert [line[0] for line in lines[2:]] == ["| vodpoller", "| SDK loop", "| SDK loop, 16 threads"]
    assert {len(line) for line in lines} == {len(lines[0])}
    events_per_sec = [float(line[1].replace(",", "")) for line in lines[2:]]
    assert min(events_per_sec) > 0
