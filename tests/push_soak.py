"""Normal callbacks at full size: kills and faults, a change of mode, a burst to a slow sink, clients other than VOD.

`python -m tests.push_soak` runs all trials, `python -m tests.push_soak kills` one; each prints a line. The exit code is
0 only if no event was lost, duplicated or left in the journal. On a busy or slow machine, set `--rate` and
`--limit-secs`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import requests

from tests.activation import ActivatedDaemon, HeldSocket, configure
from tests.benchmarks.consumers import webhook_receiver
from tests.hostile_callers import KINDS, Sizes, hostile, sizes_settle
from tests.polling import until
from tests.processes import SECRET_ID, SECRET_KEY, differences, running_system
from tests.soak import compared, lives_until, stored_rows
from vodpoller.simulator.bodies import EventGenerator

FAULTS = "push.slow=0.02,push.reset=0.02,push.lost=0.01"
MEMORY_GROWTH_MAX_MB = 64
SIGN_KEY = "the-key-of-the-callbacks"


@dataclass(frozen=True, kw_only=True)
class Result:
    """The counts of a trial; `given_up` and those after it should be 0.

    Args:
        events: Number of events that were fed.
        kills: Number of times that the daemon was killed.
        repeated: Number of repeated pushes.
        seconds: Time until all events were delivered.
        given_up: Events that VOD would have lost: none of their three pushes was answered.
        lost: Events that the sink does not have.
        doubled: Deliveries of an event after its first one.
        torn: Lines of the file that are not an event.
        stored: Rows left in the journal, pending or dead.
    """

    events: int
    kills: int = 0
    repeated: int
    seconds: float
    given_up: int
    lost: int
    doubled: int
    torn: int = 0
    stored: int

    @property
    def is_clean(self):
        return not (self.given_up + self.lost + self.doubled + self.torn + self.stored)


def with_task_ids(number_of_events, seed=1):
    """Bodies of generated events with an id of their own, so that a repeated push is recognised as the same event."""
    generator = EventGenerator(seed)
    found, number = [], 0
    while len(found) < number_of_events:
        body = generator.body(number, 0.0).decode()
        if json.loads(body)["EventType"] != "FileDeleted":
            found.append(body)
        number += 1
    return found


def kills(
    folder,
    *,
    events=20_000,
    rate=500.0,
    times=10,
    every_secs=(1.5, 3.5),
    faults=FAULTS,
    seed=1,
    limit_secs=5.0,
    tries=3,
):
    """Push events with faults while the daemon is killed and restarted; its socket stays open.

    Args:
        folder: Folder for all files.
        events: Number of events.
        rate: Events per second.
        times: Number of kills.
        every_secs: Minimum and maximum life of a daemon after its first answer.
        faults: In the form of `vodpoller simulate --faults`.
        seed: Random seed of the faults and of the kills.
        limit_secs: Maximum wait for an answer.
        tries: Maximum number of pushes of an event.
    """
    rng = random.Random(seed)
    bodies = folder / "bodies.jsonl"
    bodies.write_text("\n".join(with_task_ids(events)))
    with running_system(folder) as system, HeldSocket() as held:
        configure(system, held, source=f'sign_key = "{SIGN_KEY}"', more='[log]\nlevel = "warning"')
        began = time.monotonic()
        simulator = system.simulator(
            push=held.url,
            push_sign_key=SIGN_KEY,
            push_limit_secs=limit_secs,
            push_tries=tries,
            rate=rate,
            events_file=bodies,
            faults=faults,
            seed=seed,
        )
        for _ in range(times):
            live(system, held, simulator, secs=rng.uniform(*every_secs))
        daemon = ActivatedDaemon(system, held)
        until(lambda: is_settled(simulator), secs=120, what=simulator.stats)
        until(lambda: not stored_rows(system), secs=120, every_secs=0.5, what=daemon.tail)
        return ended(daemon, system, simulator, began, kills=times)


def live(system, held, simulator, *, secs):
    """Run a daemon and kill it `secs` after its first answer."""
    before = simulator.stats()["confirmed"]
    daemon = ActivatedDaemon(system, held)
    until(lambda: simulator.stats()["confirmed"] > before, secs=30, what=daemon.tail)
    lives_until(daemon, time.monotonic() + secs, lambda: False)
    daemon.kill()


def is_settled(simulator):
    stats = simulator.stats()
    return not stats["feeding"] and stats["confirmed"] + stats["lost"] == stats["fed"]


def ended(daemon, system, simulator, began, **more):
    """Stop the daemon, and compare what was fed with the file."""
    seconds = time.monotonic() - began
    stored = stored_rows(system)
    exit_code, _ = daemon.terminate()
    assert exit_code == 0, daemon.tail()
    stats = simulator.stats()
    found = compared(system, simulator, stats["fed"])
    del found["unconfirmed"]
    repeated, lost = stats["redeliveries"], stats["lost"]
    return Result(seconds=round(seconds, 1), repeated=repeated, given_up=lost, stored=stored, **found, **more)


def both_modes(folder, *, events=1000):
    """Push events, change the mode, and let the daemon pull the same events: the file would show a second delivery.

    Args:
        folder: Folder for all files.
        events: Number of events.
    """
    pulled = with_task_ids(events)
    pushed = [without_nulls(body) for body in pulled]
    with running_system(folder) as system, HeldSocket() as held:
        simulator = system.simulator(push=held.url, requests_per_sec=100)
        configure(system, held, more=pull_source(system, simulator.url))
        began = time.monotonic()
        daemon = ActivatedDaemon(system, held)
        simulator.feed(*pushed)
        until(lambda: is_settled(simulator), secs=60, what=simulator.stats)
        simulator.control(mode="PULL")
        simulator.feed(*pulled)
        until(lambda: is_settled(simulator), secs=60, what=simulator.stats)
        seconds = time.monotonic() - began
        stored = stored_rows(system)
        exit_code, _ = daemon.terminate()
        assert exit_code == 0, daemon.tail()
        reasons = Counter(line["reason"] for line in daemon.log("event.settled") if line["source"] == "pulled")
        assert reasons == {"already_delivered": events}, reasons
        lost, surplus = differences(pushed, system.lines())
        stats = simulator.stats()
        return Result(
            events=events,
            repeated=stats["redeliveries"],
            seconds=round(seconds, 1),
            given_up=stats["lost"],
            lost=len(lost),
            doubled=len(surplus),
            stored=stored,
        )


def pull_source(system, url):
    """The tables that a source of type "pull" needs."""
    system.key_path.write_text(SECRET_KEY)
    return (
        f'[api]\nendpoint = "{url}"\nlease_secs = 3.0\n'
        f'[credentials]\nsecret_id = "{SECRET_ID}"\nsecret_key_file = "{system.key_path}"\n'
        f'[[sources]]\nname = "pulled"\nunrouted = "dead_letter"\n'
    )


def without_nulls(body):
    """The body without top-level nulls, as VOD sends it in normal callbacks."""
    return json.dumps({name: value for name, value in json.loads(body).items() if value is not None})


def burst(folder, *, events=5000, sink_secs=4.0, concurrency=512, source="", limit_secs=5.0):
    """Push all events at once to a daemon whose only sink needs more time than VOD waits for an answer.

    Args:
        folder: Folder for all files.
        events: Number of events.
        sink_secs: Time that the sink needs for each event.
        concurrency: Number of events that the sink takes at the same time.
        source: Further lines of the source.
        limit_secs: Maximum wait for an answer.
    """
    with (
        running_system(folder) as system,
        HeldSocket() as held,
        webhook_receiver(folder, answer_secs=sink_secs) as url,
    ):
        hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\nconcurrency = {concurrency}\n'
        configure(system, held, source=source, sinks=hook)
        simulator = system.simulator(push=held.url, push_limit_secs=limit_secs)
        daemon = ActivatedDaemon(system, held)
        daemon.await_log("daemon.started")
        began = time.monotonic()
        simulator.feed(*with_task_ids(events))
        until(lambda: is_settled(simulator), secs=60, what=simulator.stats)
        answered_secs = time.monotonic() - began
        arrived = until(
            lambda: all_arrived(url, events), secs=60 + 4 * events * sink_secs / concurrency, every_secs=0.5
        )
        until(lambda: not stored_rows(system), secs=60, every_secs=0.5, what=daemon.tail)
        seconds = time.monotonic() - began
        sys.stderr.write(f"all answered after {answered_secs:.1f} s\n")
        exit_code, _ = daemon.terminate()
        assert exit_code == 0, daemon.tail()
        stats = simulator.stats()
        return Result(
            events=events,
            repeated=stats["redeliveries"],
            seconds=round(seconds, 1),
            given_up=stats["lost"],
            lost=events - arrived["events"],
            doubled=arrived["requests"] - arrived["events"],
            stored=0,
        )


def all_arrived(url, events):
    """The counts of the receiver if it has that number of events, else None."""
    arrived = requests.get(url, timeout=10, proxies={"http": ""}).json()
    return arrived if arrived["events"] == events else None


@dataclass(frozen=True, kw_only=True)
class Strangers:
    """The effect of clients that are not VOD on a daemon.

    Args:
        connections: Number of their connections, by kind of client.
        events: Number of events that were pushed at the same time.
        given_up: Events that VOD would have lost.
        lost: Events that the sink does not have.
        answer_secs: VOD's wait for answers: p50 and p99.
        memory_mb: Memory of the daemon before the clients, the maximum during their run, and after them.
        open_files: Number of the daemon's open files before the clients and after them.
        lines: Number of the daemon's log lines about the clients, by log event.
    """

    connections: dict
    events: int
    given_up: int
    lost: int
    answer_secs: tuple
    memory_mb: tuple
    open_files: tuple
    lines: dict

    @property
    def is_clean(self):
        before, most, _ = self.memory_mb
        has_grown = most - before > MEMORY_GROWTH_MAX_MB or self.open_files[1] > self.open_files[0]
        return not (self.given_up or self.lost or has_grown or sum(self.lines.values()) > len(KINDS))


def strangers(folder, *, secs=30.0, clients=4, kinds=tuple(KINDS), rate=20):
    """Push events while clients that are not VOD connect repeatedly.

    Args:
        folder: Folder for all files.
        secs: Run time of these clients.
        clients: The number of clients of each kind.
        kinds: Names of `KINDS`.
        rate: Events per second.
    """
    with running_system(folder) as system, HeldSocket() as held:
        configure(system, held)
        simulator = system.simulator(push=held.url, events=1, rate=rate, feed=int(rate * secs))
        daemon = ActivatedDaemon(system, held)
        until(lambda: simulator.stats()["confirmed"], secs=30, what=daemon.tail)
        pid, before, most = daemon.process.pid, Sizes.of(daemon.process.pid), 0
        host, port = held.address.split(":")
        with hostile((host, int(port)), kinds, clients=clients) as counts:
            ends_at = time.monotonic() + secs
            while time.monotonic() < ends_at:
                most = max(most, Sizes.of(pid).memory_bytes)
                time.sleep(0.1)
            connections = counts()
        until(lambda: is_settled(simulator), secs=60, what=simulator.stats)
        after = sizes_settle(pid, before)
        exit_code, _ = daemon.terminate()
        assert exit_code == 0, daemon.tail()
        stats = simulator.stats()
        lines = Counter(line["event"] for line in daemon.log() if line["event"].startswith("callback."))
        return Strangers(
            connections=connections,
            events=stats["fed"],
            given_up=stats["lost"],
            lost=compared(system, simulator, stats["fed"])["lost"],
            answer_secs=tuple(stats["birth_to_confirm_secs"][name] for name in ("p50", "p99")),
            memory_mb=tuple(round(size / 1e6, 1) for size in (before.memory_bytes, most, after.memory_bytes)),
            open_files=(before.open_files, after.open_files),
            lines=dict(lines),
        )


TRIALS = {"kills": kills, "modes": both_modes, "burst": burst, "strangers": strangers}


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.push_soak", description=__doc__.splitlines()[0])
    parser.add_argument("trials", nargs="*", metavar="TRIAL", help=f"{', '.join(TRIALS)}; all of them by default")
    parser.add_argument("--rate", type=float, default=500.0, help="events per second of `kills` (500)")
    parser.add_argument("--limit-secs", type=float, default=5.0, help="maximum wait for an answer (5, as VOD)")
    options = parser.parse_args()
    limit = {"limit_secs": options.limit_secs}
    more = {"kills": {"rate": options.rate, **limit}, "burst": limit}
    is_clean = True
    for name in options.trials or TRIALS:
        with tempfile.TemporaryDirectory(prefix="vodpoller-soak-") as folder:
            result = TRIALS[name](Path(folder), **more.get(name, {}))
        sys.stdout.write(f"{name}: {json.dumps(asdict(result))}\n")
        sys.stdout.flush()
        is_clean = is_clean and result.is_clean
    return 0 if is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
