"""The package of the tutorial "A sink of your own" is complete and passes the conformance suite."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import vodpoller

PAGE = Path(vodpoller.__file__).parent / "sinks" / "README.md"


@pytest.fixture
def package(tmp_path):
    """A folder with the files of the page, with metadata so that its entry points are found."""
    blocks = re.findall(r"^```\w+\n# (\S+)\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / "vodpoller_rows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    for group, points in project["entry-points"].items():
        lines = [f"{name} = {value}" for name, value in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
    return tmp_path


@pytest.mark.long
def test_the_tutorial_s_sink_passes_the_conformance_suite(package):
    path = f"{package}:{Path(vodpoller.__file__).parents[1]}"
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", str(package / "test_rows.py")]
    ended = subprocess.run(
        command, cwd=package, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^(\d+) passed in", ended.stdout, re.MULTILINE), "none may be skipped"
    assert int(re.search(r"(\d+) passed", ended.stdout)[1]) >= 18
