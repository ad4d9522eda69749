"""Temporary keys in a whole daemon: renewed under load, kept during faults of their issuer, and never shown."""

import contextlib
import json
import re
import signal
import time
from itertools import count

import pytest
import requests

from tests.expiring_keys import credentials_of, run
from tests.polling import until
from tests.processes import HeldPort, run_command
from tests.receiver import Answer, Receiver, running_receiver


class Issuer(Receiver):
    """A metadata service that issues keys of the simulator, or the answer of a test; records all secrets."""

    def __init__(self, simulator):
        super().__init__()
        self.simulator = simulator
        self.is_good = True
        self.secrets = []
        self.numbers = count()

    def answer_to(self, received):
        if not self.is_good:
            return self.answer
        found = requests.get(self.simulator.url + received.path, timeout=10)
        if found.headers["Content-Type"] == "application/json":
            self.secrets += [found.json()[name] for name in ("TmpSecretId", "TmpSecretKey", "Token")]
        return Answer(status=200, body=found.content)

    @property
    def base(self):
        return self.url.removesuffix("/callback")


@pytest.fixture
def started(system):
    """Starts a simulator, an issuer that takes its keys, and a daemon."""
    with contextlib.ExitStack() as opened:

        def start(*, life_secs, more="", **env):
            simulator = system.simulator(credential_secs=life_secs, rate=20, visibility_secs=30, poll_secs=0.5)
            issuer = opened.enter_context(running_receiver(Issuer(simulator)))
            system.configure(
                simulator.url,
                lease_secs=30,
                credentials=credentials_of("cvm_role", issuer.base) + 'role = "simulated-role"',
                more='[log]\nlevel = "debug"\n[daemon]\nshutdown_secs = 2\n' + more,
            )
            return simulator, issuer, system.daemon(**env)

        yield start


def ended_key():
    key = {"TmpSecretId": "lied-id-0001", "TmpSecretKey": "lied-key-0001", "Token": "lied-token-0001"}
    return {**key, "Code": "Success", "ExpiredTime": int(time.time()) - 5}


FAULTS = [
    Answer(status=500, body=b"broken"),
    Answer(status=302, headers={"Location": "http://127.0.0.1:1/"}),
    Answer(status=200, body=b'{"TmpSecretKey":"half-of-a-key'),
    Answer(status=200, body=json.dumps(ended_key()).encode()),
    Answer(hangs=True),
]


def test_pulls_go_on_with_the_last_key_while_its_issuer_fails(started):
    simulator, issuer, daemon = started(life_secs=600, http_proxy="http://127.0.0.1:1", no_proxy="127.0.0.1")
    daemon.await_log("credentials.refreshed")
    issuer.is_good = False
    for number, answer in enumerate(FAULTS, 1):
        issuer.answer = answer
        daemon.signal(signal.SIGHUP)  # it renews at once and logs the cause again
        daemon.await_log("credentials.failed", number=number, secs=30)
    pulls = simulator.stats()["pulls"]
    until(lambda: simulator.stats()["pulls"] > pulls + 3)
    issuer.is_good = True
    daemon.await_log("credentials.refreshed", number=2, secs=70)
    causes = {line["error_message"] for line in daemon.log("credentials.failed")}
    assert len(causes) == len(FAULTS)
    assert daemon.log("pull.failed") == []
    assert simulator.stats()["errors"] == {}
    assert re.search("half-of-a-key|lied-", daemon.log_path.read_text()) is None


def test_pulls_that_stopped_without_a_key_continue_with_a_new_one(started, system):
    simulator, issuer, daemon = started(life_secs=5)
    daemon.await_log("credentials.refreshed")
    issuer.is_good, issuer.answer = False, Answer(status=500)
    expiring, *_ = daemon.await_log("credentials.expiring", secs=30)
    assert expiring["level"] == "error"
    daemon.await_log("pull.failed", secs=30, where=lambda line: "the temporary key has ended" in line["error_message"])
    asked = run_command("status", "-c", system.config_path, "--json")
    problems = json.loads(asked.stdout)["problems"]
    assert problems[0]["what"] == "credentials"
    issuer.is_good = True
    pulled = simulator.stats()["pulls"]
    until(lambda: simulator.stats()["pulls"] > pulled + 3, secs=90, what=daemon.tail)
    assert simulator.stats()["errors"] == {}  # no key was used after its end


@pytest.mark.parametrize("provider", ["cvm_role", "assume_role"])
@pytest.mark.long
def test_keys_expire_under_load_and_no_pull_fails(system, provider):
    found = run(system, provider=provider, rate=100, life_secs=4, expiries=2)
    assert found["exit_code"] == 0
    assert found["keys_issued"] > 2
    # Both sides count the seconds of the quota, by different clocks.
    assert found["failed_pulls"].keys() <= {"RequestLimitExceeded"}
    assert found["arrived_twice"] == found["confirmed_and_missing"] == 0
    assert found["arrived"] > 100


def test_no_secret_of_a_key_is_shown_anywhere(started, system):
    with HeldPort() as port:
        listener = f'[listener]\naddress = "127.0.0.1:{port.number}"\n'
        _, issuer, daemon = started(life_secs=5, more=listener)
        daemon.await_log("credentials.refreshed", number=2, secs=30)
        commands = (["check"], ["check", "--connect"], ["status"], ["status", "--json"])
        shown = [run_command(*command, "-c", system.config_path) for command in commands]
        shown = [it.stdout + it.stderr for it in shown]
        assert "role simulated-role of this machine: a key until" in shown[1]
        status = json.loads(shown[3])["credentials"]
        assert (status["provider"], status["role"]) == ("cvm_role", "role simulated-role of this machine")
        # An unusable answer that contains each secret of a key; then the key ends.
        issuer.is_good, issuer.answer = False, Answer(status=200, body=json.dumps(issuer.secrets).encode())
        daemon.await_log("credentials.failed", secs=30)
        daemon.await_log("pull.failed", secs=30)
        for path in ("/metrics", "/status.json", "/"):
            shown.append(requests.get(port.url + path, timeout=10).text)
        assert "vodpoller_credentials_expiry_timestamp_seconds" in shown[4]
        assert 'vodpoller_credentials_refreshes_total{result="failed"}' in shown[4]
        daemon.terminate()
    everything = daemon.log_path.read_text() + "".join(shown)
    assert len(issuer.secrets) >= 6
    assert [secret for secret in issuer.secrets if secret in everything] == []
    assert re.search(r"simTmp|simToken", everything) is None


def test_no_secret_of_an_assumed_role_is_shown_anywhere(system):
    permanent = "the-permanent-key-of-the-role"
    with HeldPort() as port:
        simulator = system.simulator(
            credential_secs=5, rate=20, poll_secs=0.5, secret_id="simulated-id", secret_key=permanent
        )
        system.configure(
            simulator.url,
            credentials=credentials_of("assume_role", simulator.url).replace("simulated-key", permanent),
            more=f'[log]\nlevel = "debug"\n[listener]\naddress = "127.0.0.1:{port.number}"\n',
        )
        daemon = system.daemon()
        daemon.await_log("credentials.refreshed", number=2, secs=30)
        commands = (["check"], ["check", "--connect"], ["status"], ["status", "--json"])
        done = [run_command(*command, "-c", system.config_path) for command in commands]
        simulator.control(deny=["PullEvents"])
        daemon.await_log("pull.failed", secs=30)
        shown = [it.stdout + it.stderr for it in done]
        shown += [requests.get(port.url + path, timeout=10).text for path in ("/metrics", "/status.json", "/")]
        daemon.terminate()
    everything = daemon.log_path.read_text() + "".join(shown)
    assert "roleName/r" in everything
    assert permanent not in everything
    assert re.search(r"simTmp|simToken", everything) is None
