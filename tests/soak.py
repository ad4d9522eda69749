"""The whole daemon on a network with faults, killed repeatedly with `kill -9`: is an event lost, doubled or torn?

`python -m tests.soak --seed 1` sends 200,000 events and prints a table. The exit code is 0 only if no event was lost,
doubled, torn or left unconfirmed.
"""

import argparse
import hashlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.processes import canonical, run_command, running_system
from tests.receiver import Receiver, SlowReceiver, running_receiver

FAULTS = "reset=0.02,http_5xx=0.03,internal_error=0.02,limit=0.02,truncated=0.01,lost=0.02"
LEASE_SECS = 4.0
PAGE_EVENTS = 10_000
SLOW_EVERY = 100
SLOW_SECS = 3.0


@dataclass
class Result:
    """The counts of a soak; all but the first two, `redelivered` and `seconds` should be 0.

    Args:
        events: Number of events that were fed.
        kills: Number of times that the daemon was killed.
        redelivered: Number of redeliveries by VOD.
        lost: Events that are in no line.
        doubled: Lines of an event after its first one.
        torn: Lines that are not an event that was fed.
        unconfirmed: Events that VOD still holds.
        stored: Rows left in the journal, pending or dead.
        lost_by_webhook: Events that the webhook's receiver never accepted; 0 without a webhook.
        seconds: Duration of the soak.
    """

    events: int
    kills: int
    redelivered: int
    lost: int
    doubled: int
    torn: int
    unconfirmed: int
    stored: int
    lost_by_webhook: int
    seconds: float

    @property
    def is_clean(self):
        return not (self.lost + self.doubled + self.torn + self.unconfirmed + self.stored + self.lost_by_webhook)

    def __str__(self):
        cells = {name: f"{value:,}" for name, value in asdict(self).items()}
        widths = {name: max(len(name), len(cell)) for name, cell in cells.items()}
        return "\n".join(
            " | ".join(text.rjust(widths[name]) for name, text in row)
            for row in ([(name, name) for name in cells], list(cells.items()))
        )


def soak(
    folder,
    *,
    seed,
    events,
    kills=None,
    every_secs=(2.0, 4.0),
    rate=0.0,
    faults=FAULTS,
    webhook=False,
    slow_sink=False,
    give_up_secs=3600.0,
):
    """Deliver generated events with faults and kills until VOD holds none of them.

    Args:
        folder: Folder for all files.
        seed: Random seed of the simulator's faults and of the kills.
        events: Number of events.
        kills: Maximum number of kills; None for no limit.
        every_secs: Minimum and maximum life of a daemon.
        rate: Events per second that are created; with 0 all of them are in the queue at the start.
        faults: In the form of `vodpoller simulate --faults`.
        webhook: Whether the events also go to a webhook.
        slow_sink: As `webhook`, and one of `SLOW_EVERY` requests to it is answered only after `SLOW_SECS`: the lease is
            then nearly over, and the daemon is about to be killed.
        give_up_secs: The soak ends after this time, even if events are still unconfirmed.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    fed = {"rate": rate, "feed": events} if rate else {"events": events}
    receiver = SlowReceiver(every=SLOW_EVERY, after_secs=SLOW_SECS) if slow_sink else Receiver()
    webhook = webhook or slow_sink
    with running_system(folder) as system, running_receiver(receiver):
        simulator = system.simulator(
            seed=seed, visibility_secs=LEASE_SECS, poll_secs=0.5, faults=faults, empty="mixed", **fed
        )
        hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\nconcurrency = 64\n' if webhook else ""
        system.configure(
            simulator.url,
            lease_secs=LEASE_SECS,
            api="requests_per_sec = 2000\ntimeout_secs = 4",
            sinks=system.archive_sink + hook,
            more='[log]\nlevel = "warning"',
        )

        def is_done():
            if time.monotonic() - began > give_up_secs:
                return True
            return simulator.all_confirmed() and not stored_rows(system) and not lost_by_webhook()

        def lost_by_webhook():
            return events - len({one.headers["webhook-id"] for one in receiver.accepted}) if webhook else 0

        done_kills = 0
        while True:
            daemon = system.daemon(started=False, log_name="daemon.log")
            may_be_killed = kills is None or done_kills < kills
            # On a busy machine the start takes most of a life; the stored events must still be delivered at the end.
            lives = 5 if simulator.all_confirmed() else 1
            ends_at = time.monotonic() + (lives * rng.uniform(*every_secs) if may_be_killed else give_up_secs)
            if lives_until(daemon, ends_at, is_done):
                break
            daemon.kill()
            done_kills += 1
        exit_code, _ = daemon.terminate()
        assert exit_code == 0, daemon.tail()
        seconds = time.monotonic() - began
        return Result(
            kills=done_kills,
            redelivered=simulator.stats()["redeliveries"],
            stored=stored_rows(system),
            lost_by_webhook=lost_by_webhook(),
            seconds=round(seconds, 1),
            **compared(system, simulator, events),
        )


def lives_until(daemon, ends_at, is_done):
    """Wait until `ends_at`. Returns True as soon as `is_done` is true, False if it was not in that time."""
    while time.monotonic() < ends_at:
        time.sleep(min(0.25, max(ends_at - time.monotonic(), 0)))
        assert daemon.process.poll() is None, f"it ended by itself: {daemon.tail()}"
        if time.monotonic() < ends_at and is_done():
            return True
    return False


def compared(system, simulator, events):
    """Compare the events that were fed with the lines of the file, by content only; returns counts, as a dict."""
    wanted, unconfirmed = Counter(), 0
    for first in range(0, events, PAGE_EVENTS):
        for row in simulator.ledger(bodies=True, first=first, count=PAGE_EVENTS):
            wanted[digest(row["body"])] += 1
            unconfirmed += not row["confirmed"]
    got, torn = Counter(), 0
    data_ends_whole = True
    with system.archive.open("rb") as archive:
        for line in archive:
            data_ends_whole = line.endswith(b"\n")
            found = digest(line.decode(errors="replace"))
            torn += found not in wanted
            got[found] += found in wanted
    return {
        "events": wanted.total(),
        "lost": (wanted - got).total(),
        "doubled": (got - wanted).total(),
        "torn": torn + (not data_ends_whole),
        "unconfirmed": unconfirmed,
    }


def digest(text):
    """A SHA-256 that is the same for equal JSON documents; a text that is not JSON has its own."""
    with suppress(json.JSONDecodeError):
        text = canonical(text)
    return hashlib.sha256(text.encode()).digest()


def stored_rows(system):
    """Number of stored events: pending ones and dead letters."""
    done = run_command("status", "-c", system.config_path, "--json")
    assert done.stdout, done.stderr  # the exit code may be 1: no daemon runs
    return sum(found["events"] for found in json.loads(done.stdout)["stored"])


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--events", type=int, default=200_000)
    parser.add_argument("--kills", type=int, help="maximum number of kills; default: no limit")
    parser.add_argument("--rate", type=float, default=0.0, help="events per second; default: all at once")
    parser.add_argument("--faults", default=FAULTS)
    parser.add_argument("--webhook", action="store_true", help="deliver to a webhook as well")
    parser.add_argument(
        "--slow-sink",
        action="store_true",
        help=f"deliver to a webhook as well; one of {SLOW_EVERY} answers takes {SLOW_SECS:g} s",
    )
    options = vars(parser.parse_args())
    with tempfile.TemporaryDirectory(prefix="vodpoller-soak-") as folder:
        result = soak(Path(folder), **options)
    sys.stdout.write(f"seed {options['seed']}, faults {options['faults']}, kill -9 every 2 to 4 s\n{result}\n")
    return 0 if result.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
