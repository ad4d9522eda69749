"""`vodpoller demo`: the real daemon against the built-in simulator, told as a short story."""

import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from vodpoller.config.load import from_dict
from vodpoller.config.model import Config
from vodpoller.daemon import Daemon
from vodpoller.logs import make_logger
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.service import Simulator
from vodpoller.systemd import Notifier

EVENTS: Final = 24
EVENTS_A_SEC: Final = 6.0
LEASE_SECS: Final = 4.0
LIMIT_SECS: Final = 25.0
BROKEN: Final = '{"EventType":"CreateSnapshotByTimeOffsetComplete","SnapshotByTimeOffsetCompleteEvent":{"TaskId":oops}}'


class _Narrator(io.StringIO):
    """Stands where the log goes and says in a sentence what each line means."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.redelivered = 0

    def write(self, text: str) -> int:
        for line in text.splitlines():  # those of a batch come together
            entry: dict[str, Any] = json.loads(line)
            said = self._sentence(entry)
            if said:
                clock = entry["timestamp"][11:19]
                self._console.print(f"[dim]{clock}[/dim]  {said}", highlight=False, soft_wrap=True)
        return len(text)

    def _sentence(self, entry: dict[str, Any]) -> str:
        problem = escape(entry.get("error_message", ""))
        match entry["event"]:
            case "daemon.started":
                said = "the daemon is up and pulls"
            case "event.settled":
                said = self._settled(entry)
            case "answer.salvaged":
                said = f"an answer is not JSON: its events are read one by one, {entry['malformed']} is unreadable"
            case "event.malformed":
                said = f"[red]unreadable[/red]    event: {problem}"
            case "event.dead":
                said = f"[red]dead letter[/red]   {_name(entry)}: kept in the journal for a person"
            case "confirm.failed":
                which = f"{entry['unconfirmed']} of {entry['handles']} handles"
                said = f"[yellow]failed[/yellow]        the confirm of {which}: {problem}"
            case "daemon.stopping" | "daemon.stopped":
                said = ""
            case other:
                said = f"{entry['level']}: {other} {problem}"
        return said

    def _settled(self, entry: dict[str, Any]) -> str:
        name, sinks = _name(entry), entry["sinks"]
        if not entry["confirmed"]:
            went = ", ".join(sinks) or "no sink"
            return f"[yellow]unconfirmed[/yellow]   {name} → {went}; comes again when its lease is over"
        if sinks and all(sink["reason"] == "already_delivered" for sink in sinks.values()):
            self.redelivered += 1
            return f"[yellow]again[/yellow]         {name}: delivered before, so confirmed without a second delivery"
        went = "the journal" if entry["settlement"] == "store" else ", ".join(sinks) or "no route wants it"
        failed = len(entry.get("failed_snapshots", ()))
        note = f", {failed} image failed" if failed else ""
        took_ms = entry["duration_secs"] * 1000
        return f"[green]settled[/green]       {name} → {went}; confirmed after {took_ms:.0f} ms{note}"


def _name(entry: dict[str, Any]) -> str:
    return " ".join(filter(None, (entry["event_type"] or "event", entry["file_id"])))


def run_demo(folder: Path | None) -> int:
    """Show a queue being drained: deliveries, a refused confirm and the redelivery it leads to, a dead letter.

    Args:
        folder: Where the demo's file and journal go; None takes a temporary folder that is kept for looking at.

    Returns:
        The exit code: 0 if everything went as it should.
    """
    console = Console()
    folder = folder or Path(tempfile.mkdtemp(prefix="vodpoller-demo-"))
    folder.mkdir(parents=True, exist_ok=True)
    console.print(
        f"[bold]vodpoller demo[/bold]: {EVENTS} events and an unreadable one come to a simulated VOD queue. "
        "VOD will refuse the confirm of one, so that it comes again.\n"
    )
    options = SimulatorOptions(
        rate=EVENTS_A_SEC, feed=EVENTS, visibility_secs=LEASE_SECS, poll_secs=1.0, forget_confirms=1
    )
    with Simulator(options) as simulator:
        narrator = _Narrator(console)
        log = make_logger(narrator, log_format="json")
        config = _config(simulator.url, folder)
        daemon = Daemon(config, log=log, notifier=Notifier(""))
        simulator.feed([BROKEN])
        ends_at = time.monotonic() + LIMIT_SECS
        dead = 0

        def is_over() -> bool:
            nonlocal dead
            dead = sum(number for (_, state), number in daemon.counts().items() if state == "dead")
            return _is_done(simulator, narrator) or time.monotonic() > ends_at

        daemon.run(until=is_over)
        return _close(console, simulator.stats(), folder, redelivered=narrator.redelivered, dead=dead)


def _config(url: str, folder: Path) -> Config:
    return from_dict(
        {
            "api": {"endpoint": url, "lease_secs": LEASE_SECS},
            "credentials": {"secret_id": "demo-secret-id", "secret_key": "demo-secret-key"},
            "sources": [{"name": "main", "unrouted": "confirm"}],
            "routes": [
                {"name": "snapshots", "event_types": ["CreateSnapshotByTimeOffsetComplete"], "sinks": ["archive"]}
            ],
            "sinks": {"archive": {"type": "file", "path": str(folder / "events.jsonl")}},
            "journal": {"path": str(folder / "journal.db")},
        },
        where="demo",
        base=folder,
        env={},
    )


def _is_done(simulator: Simulator, narrator: _Narrator) -> bool:
    stats = simulator.stats()
    return bool(stats["fed"] > EVENTS and stats["confirmed"] == stats["fed"] and narrator.redelivered)


def _close(console: Console, stats: dict[str, Any], folder: Path, *, redelivered: int, dead: int) -> int:
    path = folder / "events.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    twice = len(lines) - len(set(lines))
    table = Table(title="What happened", title_justify="left", show_header=False)
    table.add_row("events that VOD had", str(stats["fed"]))
    table.add_row("confirmed", str(stats["confirmed"]))
    table.add_row("snapshot events in the file", f"{len(lines)}, {twice} of them twice" if twice else str(len(lines)))
    table.add_row("whose confirm VOD refused at first", str(stats["confirms_forgotten"]))
    table.add_row("redelivered, not delivered twice", str(redelivered))
    table.add_row("dead letters in the journal", str(dead))
    console.print()
    console.print(table)
    console.print(f"The file: {path}\nNext: copy config.example.toml, put your key in, and run `vodpoller check`.")
    return 0 if stats["confirmed"] == stats["fed"] and redelivered and dead == 1 and not twice else 1
