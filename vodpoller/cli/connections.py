"""The table of `vodpoller check --connect`."""

from collections import Counter
from collections.abc import Mapping
from typing import Final

from rich.table import Table
from rich.text import Text

from vodpoller.checkup.checks import check_connections
from vodpoller.checkup.finding import Finding, Level, worst_first
from vodpoller.cli.output import make_console, make_log
from vodpoller.config.model import Config
from vodpoller.logs import cleared, printable, searched_for

_VERDICTS: Final[Mapping[Level, tuple[str, str]]] = {
    Level.PROBLEM: ("PROBLEM", "bold red"),
    Level.WARNING: ("warning", "yellow"),
    Level.INFORMATION: ("note", ""),
    Level.GOOD: ("OK", "green"),
}


def show_connections(config: Config) -> bool:
    """Test everything that the daemon needs, and print the results. Returns whether events can flow.

    Args:
        config: Valid.
    """
    findings = worst_first(check_connections(config, make_log(config)))
    searched = searched_for(config.hidden())  # an answer of VOD or of a receiver may contain a secret
    table = Table()
    for name in ("check", "result", "detail"):
        table.add_column(name, overflow="fold")
    for finding in findings:
        table.add_row(finding.what, Text(*_VERDICTS[finding.level]), cleared(_detail(finding), searched))
    levels = Counter(finding.level for finding in findings)
    console = make_console()
    console.print(table)
    console.print(_summary(levels), soft_wrap=True)
    return not levels[Level.PROBLEM]


def _detail(finding: Finding) -> str:
    """What was found and, on a separate line, what to do."""
    return printable(finding.text) + (f"\n-> {printable(finding.remedy)}" if finding.remedy else "")


def _summary(levels: Mapping[Level, int]) -> str:
    """One line for all findings, for a person who reads only this line."""
    problems, warnings = levels.get(Level.PROBLEM, 0), levels.get(Level.WARNING, 0)
    if problems:
        summary = "1 problem keeps" if problems == 1 else f"{problems} problems keep"
        summary += " events from flowing"
    else:
        summary = "No check found a problem that keeps events from flowing"
    if warnings:
        summary += f"; {warnings} warning{'' if warnings == 1 else 's'}"
    return f"{summary}."
