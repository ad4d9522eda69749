"""Deliver events while temporary keys expire. The system tests run it for a short time; started by hand it runs longer.

.venv/bin/python -m tests.expiring_keys --rate 500 --life-secs 30 --expiries 20
"""

import argparse
import json
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

from tests.polling import until
from tests.processes import differences, running_system


def credentials_of(provider, url):
    """The lines of [credentials] for a simulator; `cvm_role` needs no permanent key."""
    if provider == "cvm_role":
        return f'provider = "cvm_role"\nmetadata_endpoint = "{url}"\n'
    permanent = 'secret_id = "simulated-id"\nsecret_key = "simulated-key"\n'
    return f'provider = "assume_role"\nrole_arn = "qcs::cam::uin/1:roleName/r"\nsts_endpoint = "{url}"\n{permanent}'


def run(system, *, provider, rate, life_secs, expiries):
    """Deliver events until `expiries` keys have been renewed; returns counts, as a dict."""
    permanent = {} if provider == "cvm_role" else {"secret_id": "simulated-id", "secret_key": "simulated-key"}
    simulator = system.simulator(
        rate=rate, credential_secs=life_secs, visibility_secs=30, poll_secs=5, requests_per_sec=100, **permanent
    )
    system.configure(
        simulator.url,
        lease_secs=30,
        api="requests_per_sec = 100",
        credentials=credentials_of(provider, simulator.url),
        more='[log]\nlevel = "debug"',
    )
    began = time.monotonic()
    daemon = system.daemon()
    wanted_secs = life_secs * expiries
    until(
        lambda: simulator.stats()["credentials_issued"] > expiries and time.monotonic() - began >= wanted_secs,
        secs=2 * wanted_secs + 60,
        every_secs=0.5,
        what=daemon.tail,
    )
    simulator.control(poll_secs=0.5)
    simulator_stats = simulator.stats()
    secs = time.monotonic() - began
    code, _ = daemon.terminate()
    ledger = simulator.ledger(bodies=True)
    lines = daemon.log()
    arrived = system.lines()
    with closing(sqlite3.connect(system.journal)) as journal:
        stored = [body.decode() for (body,) in journal.execute("SELECT body FROM letters")]
    missing, _ = differences([row["body"] for row in ledger if row["confirmed"]], [*arrived, *stored])
    return {
        "provider": provider,
        "secs": round(secs, 1),
        "exit_code": code,
        "fed": simulator_stats["fed"],
        "confirmed": simulator.stats()["confirmed"],
        "redeliveries": simulator.stats()["redeliveries"],
        "arrived": len(arrived),
        "arrived_twice": len(arrived) - len(set(arrived)),
        "confirmed_and_missing": len(missing),
        "keys_issued": simulator_stats["credentials_issued"],
        "errors_of_vod": simulator_stats["errors"],
        "failed_pulls": Counter(
            line.get("error_code", "no answer")
            for line in lines
            if line["event"] == "api.answered"
            and line["action"] == "PullEvents"
            and line.get("error_code", "no answer")
        ),
        "refreshed": sum(line["event"] == "credentials.refreshed" for line in lines),
        "warnings": Counter(line["event"] for line in lines if line["level"] in ("warning", "error")),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=500)
    parser.add_argument("--life-secs", type=float, default=30)
    parser.add_argument("--expiries", type=int, default=20)
    parser.add_argument("--provider", choices=["cvm_role", "assume_role"], default="cvm_role")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, running_system(Path(folder)) as system:
        sys.stdout.write(json.dumps(run(system, **vars(options)), indent=2) + "\n")


if __name__ == "__main__":
    main()
