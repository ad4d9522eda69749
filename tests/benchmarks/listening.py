"""The row `listener`: its memory and CPU time, and the effect of hostile clients on other requests."""

import statistics
import tempfile
import threading
import time
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from tests.benchmarks.measuring import memory_bytes, watch
from tests.benchmarks.report import Table, megabytes, number, percent
from tests.listening import Client
from tests.polling import until
from tests.processes import HeldPort, running_system

SCRAPE_SECS = 5.0
HEADS_THAT_TRICKLE = 40
ENDLESS_BODIES = 10
REQUESTS = 200


def listener(effort):
    """Measure the daemon idle and at 500 events/s, without and with a scraped listener, alternating; then requests."""
    runs = {"no listener": [], f"listener, /metrics every {SCRAPE_SECS:g} s": []}
    for _ in range(effort.repeats):
        for label, found in runs.items():
            found.append(_measured(effort, has_listener=label != "no listener"))
    without = _medians(runs["no listener"])
    lines = []
    for label, found in runs.items():
        idle_bytes, requests_per_min, idle_share, cpu_us, busy_bytes = _medians(found)
        lines.append(
            [
                label,
                megabytes(idle_bytes),
                number(requests_per_min, 1),
                percent(idle_share, 2),
                number(cpu_us),
                number(cpu_us / without[3], 3),
                megabytes(busy_bytes),
            ]
        )
    heads = (
        "",
        "memory idle",
        "requests to VOD per minute, idle",
        "CPU of a core, idle",
        "CPU µs/event at 500 events/s",
        "relative to no listener",
        "memory then",
    )
    return [Table("The listener", heads, lines), _requests(effort)]


def _medians(runs):
    return [statistics.median(values) for values in zip(*runs, strict=True)]


@contextmanager
def _running(effort, *, has_listener, rate=0):
    """Run a simulator and a daemon; yields them and a client of the listener."""
    with (
        tempfile.TemporaryDirectory(dir=effort.folder) as folder,
        running_system(Path(folder)) as system,
        HeldPort() as port,
    ):
        simulator = system.simulator(poll_secs=5, visibility_secs=30, requests_per_sec=100, rate=rate)
        more = f'[listener]\naddress = "127.0.0.1:{port.number}"\n' if has_listener else ""
        system.configure(simulator.url, lease_secs=30.0, api="", more=more)
        daemon = system.daemon()
        until(lambda: simulator.stats()["confirmed" if rate else "pulls_hanging_now"], secs=60)
        time.sleep(effort.warm_secs)
        yield simulator, daemon.process, Client(port.number)


def _measured(effort, *, has_listener):
    """Idle: memory, requests per minute, share of a core. At 500 events/s: CPU time per event, memory."""
    with _running(effort, has_listener=has_listener) as (simulator, process, client):
        with _scraping(client if has_listener else None):
            idle = watch(process, simulator, secs=effort.idle_secs)
        idle_bytes = memory_bytes(process.pid, "VmRSS")
    with _running(effort, has_listener=has_listener, rate=500) as (simulator, process, client):
        with _scraping(client if has_listener else None):
            busy = watch(process, simulator, secs=effort.secs)
        busy_bytes = memory_bytes(process.pid, "VmRSS")
    return idle_bytes, 60 * idle.requests / idle.secs, idle.cpu_secs / idle.secs, busy.cpu_us_per_event, busy_bytes


@contextmanager
def _scraping(client):
    ended = threading.Event()

    def scrape():
        while not ended.wait(SCRAPE_SECS if client else None):
            assert client.get("/metrics").status == 200

    thread = threading.Thread(target=scrape)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _requests(effort):
    lines = []
    with _running(effort, has_listener=True) as (_, _, client):
        for label, heads, bodies in (("nothing else", 0, 0), ("both", HEADS_THAT_TRICKLE, ENDLESS_BODIES)):
            with _hostile_clients(client, heads, bodies):
                for path in ("/healthz", "/metrics", "/"):
                    took = sorted(_took_secs(client, path) for _ in range(REQUESTS))
                    cells = [1000 * took[len(took) // 2], 1000 * took[int(len(took) * 0.99)], 1000 * took[-1]]
                    lines.append([f"`{path}`", label, *(number(it, 1) for it in cells)])
    title = (
        f"A good request beside {HEADS_THAT_TRICKLE} clients that trickle heads, {ENDLESS_BODIES} with endless bodies"
    )
    return Table(title, ("request", "beside", "p50 ms", "p99 ms", "slowest ms"), lines)


def _took_secs(client, path):
    began = time.monotonic()
    assert client.get(path).status == 200
    return time.monotonic() - began


@contextmanager
def _hostile_clients(client, heads, bodies):
    """Run clients that never finish their requests; a client that is refused connects again."""
    ended = threading.Event()

    def send(opening, piece):
        with ExitStack() as stack:
            while not ended.is_set():
                connection = stack.enter_context(closing(client.connect()))
                try:
                    connection.sendall(opening)
                    while not ended.wait(0.05):
                        connection.sendall(piece)
                except OSError:
                    continue

    opening = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    chunk = b"4000\r\n" + b"x" * 0x4000 + b"\r\n"
    threads = [threading.Thread(target=send, args=(opening + b"X-Long: ", b"x")) for _ in range(heads)]
    threads += [
        threading.Thread(target=send, args=(opening + b"Transfer-Encoding: chunked\r\n\r\n", chunk))
        for _ in range(bodies)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()
