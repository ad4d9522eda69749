"""The result of a check."""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """The severity of a finding, the worst first."""

    PROBLEM = "problem"
    """It keeps events from flowing."""
    WARNING = "warning"
    """Events flow, but something is probably a mistake, or will stop working."""
    INFORMATION = "information"
    """Useful to know; nothing has to be done."""
    GOOD = "good"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """The result of one check.

    Args:
        what: What was checked, and where.
        level: The severity.
        text: What was found.
        remedy: What to do; empty if there is nothing to do, or the text says it.
    """

    what: str
    level: Level
    text: str
    remedy: str = ""


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """The findings by their level; those of one level stay in their order."""
    order = list(Level)
    return sorted(findings, key=lambda finding: order.index(finding.level))
