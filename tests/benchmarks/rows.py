"""What is measured: one function per row, all in `ROWS` by the names of `--rows`. Each returns tables."""

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.benchmarks import http_calls, stored
from tests.benchmarks.callbacks import callbacks
from tests.benchmarks.consumers import RawClient, SdkLoop, SqlLoop, Vodpoller, webhook_receiver
from tests.benchmarks.effort import fresh_system, in_turns, say, versions
from tests.benchmarks.listening import listener
from tests.benchmarks.measuring import (
    Latency,
    Tail,
    Window,
    births_to_confirm,
    cpu_secs,
    ledger_part,
    memory_bytes,
    watch,
)
from tests.benchmarks.report import Table, megabytes, milliseconds, number, percent
from tests.polling import until
from tests.processes import HeldPort, run_command
from tests.sinks.servers import Postgresql, ending
from vodpoller.sinks.sql.postgresql import DIALECT as POSTGRESQL

QUOTA_REQUESTS_PER_SEC = 100
QUOTA_EVENTS_PER_SEC = 16 * QUOTA_REQUESTS_PER_SEC
UNLIMITED = 10_000.0
LOOPS = (SdkLoop(threads=1), SdkLoop(threads=16))


@dataclass(frozen=True, kw_only=True)
class Load:
    """The events and limits of the simulator.

    Args:
        options: Options of the simulator.
        backlog_per_sec: Size of the initial backlog per second of the run: more than any consumer can take, so that the
            queue never becomes empty; 0 for no backlog.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    backlog_per_sec: int = 0

    def simulator_options(self, effort):
        # Lease, long poll and (by default) quota are those of VOD.
        defaults = {"poll_secs": 5, "visibility_secs": 30, "requests_per_sec": QUOTA_REQUESTS_PER_SEC}
        backlog = int(self.backlog_per_sec * (effort.secs + effort.warm_secs + 2))
        return {**defaults, "events": backlog, **self.options}

    @property
    def quota(self):
        """Events per second that the quota permits; None without a quota."""
        return QUOTA_EVENTS_PER_SEC if "requests_per_sec" not in self.options else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One line of the main table."""

    label: str
    window: Window
    peak_bytes: int
    to_sink: Latency | None
    births_to_confirm: Sequence[float] | None

    @property
    def to_confirm(self):
        """None if the times of birth are not known."""
        return None if self.births_to_confirm is None else Latency.of(self.births_to_confirm)


HEADS = (
    "consumer",
    "events/s",
    "of the quota",
    "refused",
    "CPU µs/event",
    "peak memory",
    "birth to sink p50/p99 ms",
    "birth to confirm p50/p99 ms",
    "events/s relative to the loop",
    "CPU/event relative to the loop",
    "simulator's CPU",
    "others' CPU",
)


def table_of(title, load, measurements):
    loop = next((one for one in measurements if one.label.startswith(LOOPS[0].label)), None)
    return Table(title, HEADS, [_line(one, load, loop) for one in measurements])


def _line(one, load, loop):
    window = one.window
    return [
        one.label,
        number(window.events_per_sec),
        percent(window.events_per_sec / load.quota if load.quota else None),
        percent(window.refused_share, 2),
        number(window.cpu_us_per_event),
        megabytes(one.peak_bytes),
        milliseconds(one.to_sink),
        milliseconds(one.to_confirm),
        number(window.events_per_sec / loop.window.events_per_sec if loop else None, 2),
        number(window.cpu_us_per_event / loop.window.cpu_us_per_event if loop else None, 2),
        percent(window.simulator_cpu_share, 0),
        percent(window.other_cpu_share, 0),
    ]


# --- measuring one consumer -------------------------------------------------------------------------------------------


def measure(effort, load, consumer):
    """Start a simulator and the consumer, and measure a window of the steady state."""
    say(f"  {consumer.label} ...")
    with fresh_system(effort) as system:
        simulator = system.simulator(**load.simulator_options(effort))
        paced = not load.backlog_per_sec
        with (
            Tail(system.archive) if paced else nullcontext() as tail,
            consumer.running(system, simulator.url) as process,
        ):
            until(lambda: simulator.stats()["confirmed"], secs=30, what="nothing was confirmed within 30 s")
            time.sleep(effort.warm_secs)
            window = watch(process, simulator, secs=effort.secs)
            if window.ran_dry and not paced:
                say("  !! the backlog was used up before the end: the line shows too little")
            latencies = births_to_confirm(simulator, window) if paced else None
            return Measured(
                label=consumer.label,
                window=window,
                peak_bytes=memory_bytes(process.pid, "VmHWM"),
                to_sink=Latency.of(tail.births_to_line(window)) if paced else None,
                births_to_confirm=latencies,
            )


def compare(effort, title, load, consumers):
    consumers = [version for consumer in consumers for version in versions(effort, consumer)]
    return [table_of(title, load, [_median(runs) for runs in _measured(effort, load, consumers)])]


def _measured(effort, load, consumers):
    return in_turns(effort, consumers, lambda consumer: measure(effort, load, consumer))


def _median(measurements):
    return sorted(measurements, key=lambda one: one.window.cpu_us_per_event)[len(measurements) // 2]


# --- the rows ---------------------------------------------------------------------------------------------------------


def quota(effort):
    load = Load(options={"rtt_secs": 0.05}, backlog_per_sec=1700)
    return compare(effort, "50 ms round trip, 100 requests/s", load, [Vodpoller(), *LOOPS])


def round_trip(effort):
    load = Load(options={"rtt_secs": 0.05, "requests_per_sec": 0}, backlog_per_sec=8000)
    consumers = [Vodpoller(requests_per_sec=UNLIMITED), *LOOPS]
    return compare(effort, "50 ms round trip, no limit", load, consumers)


ZERO = Load(options={"requests_per_sec": 0}, backlog_per_sec=14_000)


def zero(effort):
    consumers = [Vodpoller(requests_per_sec=UNLIMITED), *LOOPS]
    return compare(effort, "No round trip, no limit", ZERO, consumers)


def ceiling(effort):
    load = Load(options=ZERO.options, backlog_per_sec=60_000)
    window = measure(effort, load, RawClient()).window
    cells = [
        "8 connections, nothing parsed",
        number(window.events_per_sec),
        number(window.simulator_cpu_us_per_event, 1),
        number(1e6 / window.simulator_cpu_us_per_event),
        percent(window.simulator_cpu_share, 0),
        percent(window.other_cpu_share, 0),
    ]
    heads = (
        "client",
        "events/s",
        "simulator's CPU µs/event",
        "events/s of a whole core",
        "simulator's CPU",
        "others' CPU",
    )
    return [Table("The simulator's own ceiling, no round trip, no limit", heads, [cells])]


PACED = Load(options={"rate": 500})


def paced(effort):
    tables = []
    for rate in (50, 200, 500):
        title = f"{rate} events/s, no round trip, 100 requests/s"
        tables += compare(effort, title, Load(options={"rate": rate}), [Vodpoller(), *LOOPS])
    return tables


HANG_SHARE = 0.003
HANG_SECS = 2
CONFIRM_LOADS = {
    "500 events/s": Load(options={"rate": 500}),
    "20 events/s": Load(options={"rate": 20}),
    f"500 events/s, {HANG_SHARE:.1%} of the confirms hang for {HANG_SECS} s": Load(
        options={"rate": 500, "faults": f"confirm.slow={HANG_SHARE}", "slow_secs": HANG_SECS}
    ),
}


def confirm(effort):
    """Birth to confirm: one line per run, in the order of the runs, then one line for all runs of each consumer.

    The latter has the medians of the runs' percentiles, so that a short load by other processes affects one run only.

    A confirm that hangs is carried out when it arrives, and only its answer is late. The latencies include the events
    of such calls; the hang does not delay their confirm.
    """
    return [_confirm_table(effort, title, load) for title, load in CONFIRM_LOADS.items()]


def _confirm_table(effort, title, load):
    say(title)
    consumers = versions(effort, Vodpoller())
    of_each = _measured(effort, load, consumers)
    lines = [
        _confirm_line(f"{run.label}, run {number_of_round}", [run])
        for number_of_round, runs in enumerate(zip(*of_each, strict=True), 1)
        for run in runs
    ]
    baseline = _typical(of_each[-1]) if len(of_each) > 1 else None
    lines += [_confirm_line(f"{runs[0].label}, all runs", runs, baseline) for runs in of_each]
    heads = (
        "consumer",
        "events",
        "p50 ms",
        "p99 ms",
        "p50 relative to the baseline",
        "p99 relative to the baseline",
        "pulls/s",
        "confirms/s",
        "refused by quota",
        "confirms that hung",
        "CPU µs/event",
        "simulator's CPU",
        "others' CPU",
    )
    return Table(f"Birth to confirm: {title}, no round trip, 100 requests/s", heads, lines)


def _typical(runs):
    latencies = [run.to_confirm for run in runs]
    return Latency(
        p50=statistics.median(latency.p50 for latency in latencies),
        p99=statistics.median(latency.p99 for latency in latencies),
    )


def _confirm_line(label, runs, baseline=None):
    windows = [run.window for run in runs]
    latency = _typical(runs)
    secs = sum(window.secs for window in windows)
    events = sum(window.events for window in windows)
    return [
        label,
        number(sum(len(run.births_to_confirm) for run in runs)),
        number(1000 * latency.p50, 1),
        number(1000 * latency.p99, 1),
        number(latency.p50 / baseline.p50 if baseline else None, 2),
        number(latency.p99 / baseline.p99 if baseline else None, 2),
        number(sum(window.grown("requests", "PullEvents") for window in windows) / secs, 1),
        number(sum(window.grown("requests", "ConfirmEvents") for window in windows) / secs, 1),
        number(sum(window.refused for window in windows)),
        number(sum(window.grown("faults", "confirm.slow") for window in windows)),
        number(sum(window.cpu_secs for window in windows) / events * 1e6 if events else None),
        percent(statistics.mean(window.simulator_cpu_share for window in windows), 0),
        percent(statistics.mean(window.other_cpu_share for window in windows), 0),
    ]


def paced_unlimited(effort):
    load = Load(options={"rate": 500, "requests_per_sec": 0})
    consumers = [Vodpoller(requests_per_sec=UNLIMITED), *LOOPS]
    return compare(effort, "500 events/s, no round trip, no limit", load, consumers)


def webhook(effort):
    load = Load(options={"rtt_secs": 0.05}, backlog_per_sec=1700)
    with webhook_receiver(effort.folder, answer_secs=0.05) as url:
        consumer = Vodpoller(sinks=f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\nconcurrency = 96\n')
        return compare(
            effort,
            "Webhook that answers after 50 ms, concurrency 96; 50 ms round trip, 100 requests/s",
            load,
            [consumer, *(replace(each, webhook=url) for each in LOOPS)],
        )


def postgresql(effort):
    load = Load(options={"rtt_secs": 0.05}, backlog_per_sec=1700)
    with ending(Postgresql()) as server:
        sink = f'[sinks.rows]\ntype = "postgresql"\ndsn = "{server.dsn}"\n'
        with server.connect() as db:
            for statement in POSTGRESQL.ddl("vodpoller_events"):
                db.execute(statement)
        consumers = [Vodpoller(sinks=sink), SqlLoop(dsn=server.dsn)]
        title = "A table of PostgreSQL on the same machine; 50 ms round trip, 100 requests/s"
        # The baseline may be version 0.1, which has no such sink.
        return compare(replace(effort, baseline=None), title, load, consumers)


def slow_sink(effort):
    with webhook_receiver(effort.folder, answer_secs=3600) as url:
        hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{url}"\n'
        consumers = [
            Vodpoller(label="file alone"),
            Vodpoller(sinks="{archive}" + hook, label="file beside a webhook that hangs"),
        ]
        return compare(effort, "A slow sink beside a fast one, 500 events/s, no round trip", PACED, consumers)


def idle(effort):
    say("  vodpoller ...")
    with fresh_system(effort) as system:
        simulator = system.simulator(**Load().simulator_options(effort))
        with Vodpoller().running(system, simulator.url) as process:
            until(lambda: simulator.stats()["pulls_hanging_now"], what="no pull is outstanding")
            time.sleep(effort.warm_secs)
            window = watch(process, simulator, secs=effort.idle_secs)
            outstanding = window.ended.stats["pulls_hanging_now"]
            peak_bytes = memory_bytes(process.pid, "VmHWM")
    cells = [
        f"{window.secs:.0f} s",
        number(window.requests),
        number(60 * window.requests / window.secs, 1),
        number(outstanding),
        percent(window.cpu_secs / window.secs, 2),
        megabytes(peak_bytes),
    ]
    heads = ("window", "requests", "per minute", "outstanding", "CPU of a core", "peak memory")
    return [Table("Idle", heads, [cells])]


def start(effort):
    say("  vodpoller ...")
    versions = [_version_secs() for _ in range(5)]
    runs = [_first_pull_secs(effort) for _ in range(effort.starts)]
    lines = [
        ["`vodpoller --version`", number(min(versions), 3), number(statistics.median(versions), 3)],
        [
            "`vodpoller run` until its first pull is at the simulator",
            number(min(runs), 3),
            number(statistics.median(runs), 3),
        ],
    ]
    return [Table("Start", ("", "best, s", "median, s"), lines)]


def _version_secs():
    began = time.monotonic()
    assert run_command("--version").returncode == 0
    return time.monotonic() - began


def _first_pull_secs(effort):
    with fresh_system(effort) as system:
        simulator = system.simulator(**Load().simulator_options(effort))
        system.configure(simulator.url, lease_secs=30.0)
        began = time.monotonic()
        system.daemon(started=False)
        until(lambda: simulator.stats()["requests"].get("PullEvents"), every_secs=0.005, what="no pull came")
        return time.monotonic() - began


def pulls(effort):
    limited = Load(options={"rtt_secs": 0.05}, backlog_per_sec=1700)
    unlimited = Load(options={"rtt_secs": 0.05, "requests_per_sec": 0}, backlog_per_sec=8000)
    lines = []
    for number_of_pulls in effort.pulls:
        say(f"  max_concurrent_pulls = {number_of_pulls}")
        within = measure(effort, limited, Vodpoller(max_concurrent_pulls=number_of_pulls))
        free = measure(effort, unlimited, Vodpoller(max_concurrent_pulls=number_of_pulls, requests_per_sec=UNLIMITED))
        lines.append(
            [
                str(number_of_pulls),
                number(within.window.events_per_sec),
                percent(within.window.events_per_sec / QUOTA_EVENTS_PER_SEC),
                percent(within.window.refused_share, 2),
                number(free.window.events_per_sec),
                number(free.window.cpu_us_per_event),
                megabytes(free.peak_bytes),
            ]
        )
    heads = (
        "`max_concurrent_pulls`",
        "events/s at 100 requests/s",
        "of the quota",
        "refused",
        "events/s without limit",
        "CPU µs/event",
        "peak memory",
    )
    return [Table("Throughput against `max_concurrent_pulls`, 50 ms round trip", heads, lines)]


def drain(effort):
    heads = (
        "events at the start",
        "events/s until all are confirmed",
        "CPU µs/event",
        "memory at half",
        "at the end",
        "peak",
        "journal",
        "its WAL",
        "sink's file",
        "log",
    )
    lines = [_drained(effort, number_of_events) for number_of_events in effort.backlogs]
    title = "Throughput, memory and journal against backlog, no round trip, no limit, with a listener"
    return [Table(title, heads, lines)]


def _drained(effort, events):
    say(f"  backlog of {events}")
    with fresh_system(effort) as system, HeldPort() as port:
        simulator = system.simulator(
            **Load(options={"requests_per_sec": 0, "events": events}).simulator_options(effort)
        )
        listener_table = f'[listener]\naddress = "127.0.0.1:{port.number}"\n'
        consumer = Vodpoller(requests_per_sec=UNLIMITED, more=listener_table)
        with consumer.running(system, simulator.url) as process:
            resident = {}

            def is_drained():
                confirmed = simulator.stats()["confirmed"]
                resident[confirmed] = memory_bytes(process.pid, "VmRSS")
                return confirmed == events

            until(is_drained, secs=60 + events / 500, every_secs=0.25, what="the backlog was not drained")
            used_secs = cpu_secs(process.pid)
            at_half = resident[min(resident, key=lambda confirmed: abs(confirmed - events / 2))]
            return [
                number(events),
                number(events / _draining_secs(simulator, events)),
                number(used_secs / events * 1e6),
                megabytes(at_half),
                megabytes(resident[events]),
                megabytes(memory_bytes(process.pid, "VmHWM")),
                *(megabytes(path.stat().st_size) for path in _files(system)),
            ]


def _files(system):
    return system.journal, Path(f"{system.journal}-wal"), system.archive, system.folder / "daemon1.log"


def _draining_secs(simulator, events):
    """Seconds from the first confirm to the last."""
    part = min(events, 1000)
    first = min(row["confirmed_at"] for row in ledger_part(simulator, 0, part))
    last = max(row["confirmed_at"] for row in ledger_part(simulator, events - part, part))
    return last - first


def http(effort):
    say("  calls ...")
    baseline = effort.baseline and effort.baseline.with_name("python")
    with fresh_system(effort) as system:
        simulator = system.simulator(requests_per_sec=0)
        found = http_calls.compared(f"{simulator.url}/", int(300 * effort.secs), baseline)
    session_us = found["requests.Session"]
    lines = [[label, number(us), number(us / session_us, 2)] for label, us in found.items()]
    return [Table("A call over a kept connection", ("client", "CPU µs", "relative to requests.Session"), lines)]


ROWS = {
    "quota": quota,
    "round-trip": round_trip,
    "zero": zero,
    "ceiling": ceiling,
    "paced": paced,
    "confirm": confirm,
    "paced-unlimited": paced_unlimited,
    "http": http,
    "webhook": webhook,
    "postgresql": postgresql,
    "slow-sink": slow_sink,
    "idle": idle,
    "start": start,
    "pulls": pulls,
    "drain": drain,
    "backlog": stored.backlog,
    "stored": stored.stored,
    "recover": stored.recover,
    "listener": listener,
    "callbacks": callbacks,
}
