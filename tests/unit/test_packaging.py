"""pyproject.toml and .ci/: the declared versions are the tested ones."""

import re
import runpy
import tomllib
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CI = (ROOT / ".ci" / "run").read_text()
lowest = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"]


@pytest.mark.parametrize(
    ("requirement", "constraint"),
    [
        ("structlog>=25.5", "structlog==25.5"),
        ("requests>=2.32.3,<3", "requests==2.32.3"),
        ("requests[socks] >= 2.32.3, <3", "requests==2.32.3"),
        ("zope.interface>=7.0.post1,!=7.1", "zope.interface==7.0.post1"),
    ],
)
def test_the_constraint_is_the_lower_bound(requirement, constraint):
    assert lowest(requirement) == constraint


@pytest.mark.parametrize("requirement", ["structlog", "structlog<26", "structlog==25.5", "structlog<26,>=25.5"])
def test_a_requirement_without_a_lower_bound_in_front_is_an_error(requirement):
    with pytest.raises(ValueError, match=re.escape(f"{requirement!r} in pyproject.toml must begin")):
        lowest(requirement)


EXTRAS = {name: words for name, words in PROJECT["optional-dependencies"].items() if name not in ("dev", "test")}


@pytest.mark.parametrize("requirement", [*PROJECT["dependencies"], *chain(*EXTRAS.values())])
def test_every_dependency_has_a_lower_bound_to_test_with(requirement):
    assert lowest(requirement)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_test_extra_includes_every_other_extra(extra):
    (extras,) = re.findall(r"vodpoller\[([a-z,]+)\]", " ".join(PROJECT["optional-dependencies"]["test"]))
    assert extra in extras.split(",")


@pytest.mark.parametrize("name", ["requests", "urllib3"])
def test_a_library_with_overridden_private_methods_is_bounded_above(name):
    (requirement,) = [words for words in PROJECT["dependencies"] if words.startswith(name)]
    assert requirement.endswith(",<3")


@pytest.mark.parametrize("name", ["ruff", "mypy", "import-linter", "types-requests", "types-jmespath"])
def test_the_tools_that_check_the_code_are_pinned(name):
    (requirement,) = [words for words in PROJECT["optional-dependencies"]["dev"] if words.startswith(name)]
    assert requirement.startswith(f"{name}==")


def test_the_classifiers_name_the_pythons_that_ci_tries():
    named = [words.rpartition(" ")[2] for words in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", words)]
    (others,) = re.findall(r"^for minor in (.*); do$", CI, re.MULTILINE)
    assert [PROJECT["requires-python"].removeprefix(">="), *others.split()] == named
