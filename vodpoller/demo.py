"""`vodpoller demo`: the real daemon against the built-in simulator, with a sentence for each step."""

import io
import json
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vodpoller.config.load import load
from vodpoller.journal.operator import Filter, Letters
from vodpoller.logs import make_logger
from vodpoller.service import Service
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator
from vodpoller.systemd import Notifier

EVENTS: Final = 24
EVENTS_PER_SEC: Final = 6.0
LEASE_SECS: Final = 4.0
LIMIT_SECS: Final = 25.0
BROKEN: Final = '{"EventType":"CreateSnapshotByTimeOffsetComplete","SnapshotByTimeOffsetCompleteEvent":{"TaskId":oops}}'
CONFIGURATION: Final = """\
# The configuration of `vodpoller demo`. Its simulator has ended, so there is nothing to pull; `vodpoller deadletters`
# finds the journal with this file.

[api]
endpoint = {url}
lease_secs = {lease_secs}

[credentials]
secret_id = "demo-secret-id"
secret_key = "demo-secret-key"

[[sources]]
name = "main"
unrouted = "confirm"

[[routes]]
name = "snapshots"
event_types = ["CreateSnapshotByTimeOffsetComplete"]
sinks = ["archive"]

[sinks.archive]
type = "file"
path = {file}

[journal]
path = {journal}
"""
# The sentences for `event.settled` and `event.dead` cover the first three; the demo itself causes the last two.
WITHOUT_SENTENCE: Final = frozenset(
    {"answer.salvaged", "confirm.failed", "event.malformed", "daemon.stopping", "daemon.stopped"}
)


class _Narrator(io.StringIO):
    """Receives the log lines, and prints a sentence that explains each of them."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.redelivered = 0

    def write(self, text: str) -> int:
        for line in text.splitlines():  # the lines of a batch arrive in one write
            entry: dict[str, Any] = json.loads(line)
            sentence = self._sentence(entry)
            if sentence:
                clock = entry["timestamp"][11:19]
                self._console.print(f"[dim]{clock}[/dim]  {sentence}", highlight=False, soft_wrap=True)
        return len(text)

    def _sentence(self, entry: dict[str, Any]) -> str:
        problem = escape(entry.get("error_message", ""))
        match entry["event"]:
            case "daemon.started":
                sentence = "the daemon has started and pulls"
            case "event.settled":
                sentence = self._settled(entry)
            case "event.dead":
                sentence = (
                    f"[red]dead letter[/red]   {_name(entry)}: kept in the journal for a person, because {problem}"
                )
            case name if name in WITHOUT_SENTENCE:
                sentence = ""
            case other:
                sentence = f"{entry['level']}: {other} {problem}"
        return sentence

    def _settled(self, entry: dict[str, Any]) -> str:
        name, sinks = _name(entry), entry["sinks"]
        if not entry["confirmed"]:
            went = ", ".join(sinks) or "no sink"
            why = f"VOD did not confirm it ({entry.get('confirm_error_code') or entry['confirm_result']})"
            return f"[yellow]unconfirmed[/yellow]   {name} → {went}; {why}, so it comes again when its lease ends"
        if entry["settlement"] == "store":
            return ""  # the sentence for `event.dead` covers it
        if sinks and all(sink["reason"] == "already_delivered" for sink in sinks.values()):
            self.redelivered += 1
            return f"[yellow]again[/yellow]         {name}: delivered before, so confirmed without a second delivery"
        went = ", ".join(sinks) or "no route takes it"
        failed = len(entry.get("failed_snapshots", ()))
        note = f", failed images: {failed}" if failed else ""
        took_ms = entry["duration_secs"] * 1000
        return f"[green]settled[/green]       {name} → {went}; confirmed after {took_ms:.0f} ms{note}"


def _name(entry: dict[str, Any]) -> str:
    return " ".join(filter(None, (entry["event_type"] or "event", entry["file_id"])))


def run_demo(folder: Path | None) -> int:
    """Show a queue being drained: deliveries, a refused confirm and the redelivery that follows, a dead letter.

    Args:
        folder: For the file, the journal and the configuration, which are kept; None makes a new temporary folder.

    Returns:
        The exit code: 0 if everything happened as expected.
    """
    console = Console()
    folder = (folder or Path(tempfile.mkdtemp(prefix="vodpoller-demo-"))).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]vodpoller demo[/bold]: {EVENTS} events and a broken one arrive in a simulated queue of VOD.\n"
    )
    options = SimulatorOptions(
        rate=EVENTS_PER_SEC, feed=EVENTS, visibility_secs=LEASE_SECS, poll_secs=1.0, forget_confirms=1
    )
    with Simulator(options) as simulator:
        narrator = _Narrator(console)
        path = _write_configuration(folder, simulator.url)
        read = partial(load, path, env={})
        service = Service(
            read(),
            read=read,
            make_log=lambda _config: make_logger(narrator, log_format="json"),
            notifier=Notifier(""),
        )
        simulator.feed([BROKEN])
        ends_at = time.monotonic() + LIMIT_SECS
        service.run(until=lambda: _is_done(simulator, narrator) or time.monotonic() > ends_at)
        return _print_summary(console, simulator.stats(), path, redelivered=narrator.redelivered)


def _write_configuration(folder: Path, url: str) -> Path:
    path = folder / "demo.toml"
    path.touch(mode=0o600)  # it contains a key, although a worthless one
    strings = {"url": url, "file": str(folder / "events.jsonl"), "journal": str(folder / "journal.db")}
    quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in strings.items()}
    path.write_text(CONFIGURATION.format(lease_secs=LEASE_SECS, **quoted), encoding="utf-8")
    return path


def _is_done(simulator: Simulator, narrator: _Narrator) -> bool:
    stats = simulator.stats()
    return bool(stats["fed"] > EVENTS and stats["confirmed"] == stats["fed"] and narrator.redelivered)


def _print_summary(console: Console, stats: dict[str, Any], configuration: Path, *, redelivered: int) -> int:
    path = configuration.with_name("events.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    twice = len(lines) - len(set(lines))
    with Letters(configuration.with_name("journal.db"), makes_files=False) as letters:
        dead = [letter.id for letter in letters.stored(Filter())]
    table = Table(title="What happened", title_justify="left", show_header=False)
    table.add_row("events that VOD had", str(stats["fed"]))
    table.add_row("confirmed", str(stats["confirmed"]))
    table.add_row("snapshot events in the file", f"{len(lines)}, {twice} of them twice" if twice else str(len(lines)))
    table.add_row("events whose confirm VOD refused at first", str(stats["confirms_forgotten"]))
    table.add_row("events redelivered, not delivered twice", str(redelivered))
    table.add_row("dead letters in the journal", str(len(dead)))
    console.print()
    console.print(table)
    steps = [f"cat {quote(str(path))}"]
    steps += [f"{_program()} deadletters show {number} -c {quote(str(configuration))}" for number in dead[-1:]]
    hints = ["Next, type these commands:", *(f"  {step}" for step in steps)]
    hints.append('With your own account: README.md, "Use it with your account".')
    console.print("\n".join(hints), markup=False, emoji=False, highlight=False, soft_wrap=True)
    return 0 if stats["confirmed"] == stats["fed"] and redelivered and len(dead) == 1 and not twice else 1


def _program() -> str:
    """The command of this program, as a shell in any folder accepts it."""
    called = Path(sys.argv[0]).absolute()
    if called.name != "vodpoller":
        return f"{quote(sys.executable)} -m vodpoller"
    found = shutil.which("vodpoller")
    return "vodpoller" if found and Path(found).resolve() == called.resolve() else quote(str(called))
