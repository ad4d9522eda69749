"""The listener of a whole daemon: its answers in each state, and a daemon without it."""

import json
import re
import resource
import signal
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

import vodpoller.daemon as daemon_module
from tests.listening import Client
from tests.polling import until
from tests.processes import HeldPort, ServiceManager, environment, run_command
from tests.receiver import Answer
from tests.system.test_faults import InterceptingProxy, numbered
from vodpoller.config.load import load
from vodpoller.logs import make_logger
from vodpoller.service import Service
from vodpoller.systemd import Notifier
from vodpoller.vod.client import VodClient

PATHS = ("/healthz", "/readyz", "/metrics", "/status.json", "/")
PACKAGES = {"waitress", "prometheus_client", "jinja2", "markupsafe", "vodpoller.listener.server"}


@pytest.fixture
def port():
    with HeldPort() as port:
        yield port.number


def with_listener(port, more=""):
    return f'[listener]\naddress = "127.0.0.1:{port}"\n{more}\n'


def statuses(client):
    return tuple(client.get(path).status for path in PATHS)


def problems(client):
    return [
        f"{it['what']}: {it['cause']} | {it['remedy']}"
        for it in json.loads(client.get("/status.json").body)["problems"]
    ]


def metrics(client, name):
    """The values of a metric by label set."""
    found = re.findall(rf"^vodpoller_{name}(?:\{{(.*)\}})? (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return {frozenset(re.findall(r'(\w+)="([^"]*)"', labels)): float(value) for labels, value in found}


def listening(pid):
    """Number of listening TCP sockets of a process."""
    listening = {
        line.split()[9] for name in ("tcp", "tcp6") for line in _lines(f"/proc/{pid}/net/{name}") if " 0A " in line
    }
    own = (str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir())
    return sum(target.removeprefix("socket:[").removesuffix("]") in listening for target in own)


def _lines(path):
    return Path(path).read_text().splitlines()[1:] if Path(path).exists() else []


# --- without it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("listener", ["", "[listener]"], ids=["no table", "no address"])
def test_without_an_address_nothing_is_imported_or_opened(system, listener):
    simulator = system.simulator()
    system.configure(simulator.url, more=listener)
    (system.folder / "program.py").write_text(
        "import sys\n"
        "from vodpoller.cli.app import main\n"
        "from vodpoller.service import Service\n"
        "run = Service.run\n"
        "def run_shortly(service):\n"
        "    code = run(service, until=lambda: True)\n"
        f"    assert not {PACKAGES!r} & set(sys.modules), sys.modules.keys()\n"
        "    return code\n"
        "Service.run = run_shortly\n"
        "main()\n"
    )
    done = run_program(system.folder / "program.py", "run", "-c", system.config_path)
    assert done.returncode == 0, done.stderr
    daemon = system.daemon()
    assert listening(daemon.process.pid) == 0


def run_program(path, *args):
    return subprocess.run(
        [sys.executable, str(path), *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
        env=environment(),
    )


# --- in each state ----------------------------------------------------------------------------------------------------


def test_without_problems_all_paths_answer_and_match_the_command(system, port):
    simulator = system.simulator(events=3)
    system.configure(simulator.url, more=with_listener(port))
    daemon = system.daemon()
    until(simulator.all_confirmed)
    client = Client(port)
    assert statuses(client) == (200,) * 5
    assert listening(daemon.process.pid) == 1

    def same():
        by_command = json.loads(run_command("status", "--json", "-c", system.config_path).stdout)
        by_http = json.loads(client.get("/status.json").body)
        return (
            by_command.keys() == by_http.keys()
            and by_command["sinks"] == by_http["sinks"]
            and by_http["problems"] == []
        )

    until(same)
    assert daemon.terminate()[0] == 0
    with pytest.raises(ConnectionRefusedError):
        client.get("/healthz")


def test_an_unreachable_vod_is_not_unhealthy(system, port):
    with HeldPort() as closed:
        system.configure(closed.url, more=with_listener(port))
        system.daemon()
        client = Client(port)
        until(lambda: problems(client))
        assert statuses(client) == (200,) * 5
        assert problems(client)[0].startswith("source main: no pull has succeeded since the start")
        assert metrics(client, "pull_errors_total")[frozenset({("source", "main"), ("code", "connection")})] >= 1


def test_a_dead_sink_is_not_unhealthy(system, port, receiver):
    receiver.answer = Answer(status=503)
    simulator = system.simulator(events=3)
    hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\nbreaker_failures = 1\n'
    system.configure(simulator.url, sinks=system.archive_sink + hook, more=with_listener(port))
    system.daemon()
    client = Client(port)
    until(lambda: problems(client))
    assert statuses(client) == (200,) * 5
    assert problems(client)[0].startswith("sink hook: down since")
    assert metrics(client, "sink_up") == {frozenset({("sink", "archive")}): 1, frozenset({("sink", "hook")}): 0}


def test_a_full_disk_is_not_unhealthy(system, port):
    simulator = system.simulator()
    system.configure(simulator.url, more=with_listener(port))
    daemon = system.daemon()
    client = Client(port)
    limits = resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(daemon.process.pid, resource.RLIMIT_FSIZE, (1, limits[1]))
    until(lambda: problems(client))
    assert statuses(client) == (200,) * 5
    assert problems(client)[0].startswith("journal: ")
    assert "Make room on the disk" in problems(client)[0]


def test_a_stopping_daemon_is_healthy_and_not_ready(system, port, receiver):
    receiver.answer = Answer(hangs=True)
    simulator = system.simulator(events=1)
    hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\ntimeout_secs = 30\n'
    system.configure(
        simulator.url, sinks=hook, lease_secs=3, more=f"[daemon]\nshutdown_secs = 20\n{with_listener(port)}"
    )
    with ServiceManager(system.folder / "notify") as manager:
        daemon = system.daemon(NOTIFY_SOCKET=manager.path)
        until(lambda: receiver.received)
        client = Client(port)
        assert statuses(client)[:2] == (200, 200)
        daemon.signal(signal.SIGTERM)
        until(lambda: manager.messages("STOPPING=1"))
        until(lambda: client.get("/readyz").status == 503)
        assert statuses(client) == (200, 503, 200, 200, 200)
    receiver.released.set()
    assert daemon.process.wait(30) == 0


def test_a_blocked_puller_is_unhealthy_until_it_continues(system, port, monkeypatch):
    monkeypatch.setattr(daemon_module, "OVERDUE_SECS", 0.2)
    released = threading.Event()
    pull = VodClient.pull

    def blocked(client, source, sub_app_id):
        assert released.wait(30)
        return pull(client, source, sub_app_id)

    monkeypatch.setattr(VodClient, "pull", blocked)
    simulator = system.simulator()
    system.configure(
        simulator.url, lease_secs=1, api="timeout_secs = 1", more=f"[daemon]\nshutdown_secs = 6\n{with_listener(port)}"
    )
    over = threading.Event()
    with (system.folder / "in-process.log").open("w") as log_file:
        log = make_logger(log_file, log_format="json")
        config = load(system.config_path, env={})
        service = Service(config, read=lambda: config, make_log=lambda _config: log, notifier=Notifier.of({}))
        thread = threading.Thread(target=service.run, kwargs={"until": over.is_set})
        thread.start()
        try:
            client = Client(port)
            until(lambda: is_listening(client) and client.get("/healthz").status == 503)
            assert client.get("/healthz").text.startswith("puller main is overdue by")
            assert statuses(client)[1:] == (200,) * 4
            released.set()
            until(lambda: client.get("/healthz").status == 200)
        finally:
            released.set()
            over.set()
            thread.join()


def is_listening(client):
    try:
        return client.get("/healthz").status
    except ConnectionRefusedError:
        return None


# --- numbers and the password -----------------------------------------------------------------------------------------


def test_outcomes_over_sinks_are_events_times_their_sinks(system, port, receiver):
    receiver.answer = Answer(status=503)
    faults = "pull.reset=0.05,pull.http_5xx=0.05,confirm.lost=0.1,confirm.reset=0.05"
    simulator = system.simulator(events=200, faults=faults)
    hook = f'[sinks.hook]\ntype = "webhook"\nurl = "{receiver.url}"\nbreaker_failures = 2\n'
    system.configure(simulator.url, sinks=system.archive_sink + hook, more=with_listener(port))
    killed = system.daemon()
    until(lambda: simulator.stats()["confirmed"] > 50, secs=60)
    killed.kill()
    daemon = system.daemon()
    until(simulator.all_confirmed, secs=60)
    simulator.feed(*map(numbered, range(200)))
    until(lambda: simulator.stats()["confirmed"] > 250, secs=60)
    system.configure(
        simulator.url, sinks=system.archive_sink + hook, more=f"[daemon]\nshutdown_secs = 20\n{with_listener(port)}"
    )
    daemon.signal(signal.SIGHUP)
    daemon.await_log("daemon.reloaded")
    until(simulator.all_confirmed, secs=60)
    client = Client(port)

    def agree():
        arrived, settled = (sum(metrics(client, f"events_{it}_total").values()) for it in ("received", "settled"))
        by_sink = Counter()
        for labels, value in metrics(client, "sink_deliveries_total").items():
            by_sink[dict(labels)["sink"]] += value
        return arrived >= 200 and {arrived} == {settled, by_sink["archive"], by_sink["hook"]}

    until(agree)
    assert metrics(client, "sink_deliveries_total")[frozenset({("sink", "hook"), ("outcome", "stored")})] > 0


@pytest.mark.parametrize("answer", ["allowed", "forbidden"])
def test_the_backlog_is_requested_only_with_a_listener(system, port, answer):
    simulator = system.simulator()
    error = {"Code": "UnauthorizedOperation", "Message": "you may not (vod:DescribeEventsState)"}
    response = {"CountOfEventsToPull": 4321} if answer == "allowed" else {"Error": error}

    def intercept(exchange):
        if exchange.action == "DescribeEventsState":
            exchange.answer(json.dumps({"Response": {**response, "RequestId": "r-1"}}).encode())
        else:
            exchange.pass_on()

    with InterceptingProxy(simulator.url) as proxy:
        proxy.intercept = intercept
        system.configure(proxy.url, more=with_listener(port))
        daemon = system.daemon()
        client = Client(port)
        until(lambda: "DescribeEventsState" in dict(proxy.asked))
        expected = {frozenset({("source", "main")}): 4321.0}
        if answer == "allowed":
            assert until(lambda: metrics(client, "queue_events")) == expected
        else:
            until(lambda: proxy.pulls() > 1)
            assert metrics(client, "queue_events") == {}
            assert problems(client) == []
        assert daemon.problems() == []
        daemon.terminate()

        proxy.asked.clear()
        system.configure(proxy.url)
        system.daemon()
        until(lambda: proxy.pulls() > 2)
        assert "DescribeEventsState" not in dict(proxy.asked)


def test_a_new_password_is_used_after_a_sighup(system, port):
    simulator = system.simulator()
    path = system.folder / "password"
    path.write_text("the first password\n")
    system.configure(simulator.url, more=f'[log]\nlevel = "debug"\n{with_listener(port)}password_file = "{path}"')
    daemon = system.daemon()
    client = Client(port)
    assert [client.get("/", password=it).status for it in ("the first password", "the second one")] == [200, 401]
    path.write_text("the second one\n")
    daemon.signal(signal.SIGHUP)
    until(lambda: client.get("/", password="the second one").status == 200)
    assert client.get("/", password="the first password").status == 401
    assert daemon.terminate()[0] == 0
    log = daemon.log_path.read_text()
    assert "the first password" not in log
    assert "the second one" not in log
