"""The table of `vodpoller check --connect`."""

from rich.table import Table
from rich.text import Text

from vodpoller.checkup.checks import check_connections
from vodpoller.cli.output import make_console, make_log
from vodpoller.config.model import Config
from vodpoller.logs import printable


def show_connections(config: Config) -> bool:
    """Try everything that the daemon needs, and print the results. Returns whether all of it works.

    Args:
        config: Valid.
    """
    table = Table("what", "", "found")
    good = True
    for finding in check_connections(config, make_log(config)):
        verdict = Text("good", style="green") if finding.good else Text("BAD", style="bold red")
        table.add_row(finding.what, verdict, printable(finding.text))
        good = good and finding.good
    make_console().print(table)
    return good
