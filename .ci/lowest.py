"""Prints constraints for pip that ask for the lowest version of each dependency that pyproject.toml allows."""

import re
import sys
import tomllib
from pathlib import Path

BOUND = re.compile(r"(?P<name>[\w.-]+)\s*(\[[^]]*\])?\s*>=\s*(?P<version>[\w.]+)\s*(,[^>]*)?")


def lowest(requirement: str) -> str:
    """The constraint for a requirement's lower bound.

    Args:
        requirement: An entry of `project.dependencies`, such as "requests>=2.32.3,<3".

    Raises:
        ValueError: It does not begin with a lower bound.
    """
    found = BOUND.fullmatch(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} in pyproject.toml must begin with its lower bound: NAME>=VERSION")
    return f"{found['name']}=={found['version']}"


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    named = [requirement for extra in ("callback", "listener", "mysql", "postgresql") for requirement in extras[extra]]
    requirements = [*project["dependencies"], *named]
    sys.stdout.writelines(f"{lowest(requirement)}\n" for requirement in requirements)
