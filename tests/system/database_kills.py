"""A database and a daemon that are killed alternately: each event is one row, and is counted once.

`python -m tests.system.database_kills --database mariadb` delivers 10,000 events across ten kills of each and prints
the counts; the exit code is 0 only if each row exists once and the counter is right. The suite does the same with fewer
events and kills.
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

from tests.polling import until
from tests.processes import canonical, running_system
from tests.sinks.servers import Mariadb, Postgresql, ending
from vodpoller.sinks.sql.mysql import DIALECT as MYSQL
from vodpoller.sinks.sql.postgresql import DIALECT as POSTGRESQL

DATABASES = {"postgresql": (Postgresql, POSTGRESQL), "mariadb": (Mariadb, MYSQL)}
LEASE_SECS = 5.0
MAX_WAIT_SECS = 300.0


@dataclass
class Result:
    """The counts of a trial; `lost`, `doubled`, `foreign` and `miscounted` should be 0.

    Args:
        events: Number of events that were fed.
        kills: Number of kills of the server; the daemon is killed equally often.
        lost: Events that are in no row.
        doubled: Rows of an event after its first one.
        foreign: Rows that are not an event that was fed.
        miscounted: Difference between the counter that a statement increments and the number of events.
        stored: Number of stored events that were delivered when the database was back.
        seconds: Duration of the trial.
    """

    events: int
    kills: int
    lost: int
    doubled: int
    foreign: int
    miscounted: int
    stored: int
    seconds: float

    @property
    def is_clean(self):
        return not (self.lost or self.doubled or self.foreign or self.miscounted)


class Trial:
    """One server, one simulator, and one daemon after the other."""

    def __init__(self, system, server, dialect, seed):
        self.system = system
        self.server = server
        self.random = random.Random(seed)
        self.fed = []
        self.daemons = []
        with server.connect() as db, db.cursor() as cursor:
            for table in ("vodpoller_events", "vodpoller_inbox"):
                cursor.execute(f"DROP TABLE IF EXISTS {table}")
                for statement in dialect.ddl(table):
                    cursor.execute(statement)
            cursor.execute("DROP TABLE IF EXISTS counted")
            cursor.execute("CREATE TABLE counted (number integer NOT NULL)")
            cursor.execute("INSERT INTO counted VALUES (0)")
        self.simulator = system.simulator(visibility_secs=LEASE_SECS, poll_secs=0.2)
        common = f'type = "{dialect.name}"\ndsn = "{server.dsn}"\ntimeout_secs = 2\n'
        statement = 'statement = "UPDATE counted SET number = number + 1"\n'
        sinks = f"[sinks.rows]\n{common}[sinks.counted]\n{common}{statement}"
        system.configure(self.simulator.url, lease_secs=LEASE_SECS, sinks=sinks)
        self.start_daemon()

    def start_daemon(self):
        self.daemons.append(self.system.daemon())

    def feed(self, number):
        bodies = [
            json.dumps({"EventType": "NewFileUpload", "FileUploadEvent": {"FileId": str(len(self.fed) + at)}})
            for at in range(number)
        ]
        self.fed += bodies
        self.simulator.feed(*bodies)

    def kill_server_during(self, number):
        self._feed_and_wait_for_some(number)
        self.server.kill()
        time.sleep(self.random.uniform(0.0, 1.0))
        self.server.start()

    def kill_daemon_during(self, number):
        self._feed_and_wait_for_some(number)
        self.daemons[-1].kill()
        self.start_daemon()

    def _feed_and_wait_for_some(self, number):
        before = self.simulator.stats()["confirmed"]
        self.feed(number)
        some = self.random.randrange(number)
        until(lambda: self.simulator.stats()["confirmed"] >= before + some, secs=60, what=self.daemons[-1].tail)

    def result(self, kills, began_at):
        rows, number = until(self._all_there, secs=MAX_WAIT_SECS, every_secs=0.5, what=self.daemons[-1].tail)
        exit_code, _ = self.daemons[-1].terminate()
        assert exit_code == 0
        fed, arrived = Counter(map(canonical, self.fed)), Counter(map(canonical, rows))
        extra = arrived - fed
        return Result(
            events=len(self.fed),
            kills=kills,
            lost=(fed - arrived).total(),
            doubled=sum(count for body, count in extra.items() if body in fed),
            foreign=sum(count for body, count in extra.items() if body not in fed),
            miscounted=abs(number - len(self.fed)),
            stored=sum(len(daemon.log("pending.delivered")) for daemon in self.daemons),
            seconds=round(time.monotonic() - began_at, 1),
        )

    def _all_there(self):
        """The bodies and the counter, or None while rows or counts are missing."""
        if not self.simulator.all_confirmed():
            return None
        with self.server.connect() as db, db.cursor() as cursor:
            cursor.execute("SELECT number FROM counted")
            ((number,),) = cursor.fetchall()
            cursor.execute("SELECT count(*) FROM vodpoller_events")
            ((rows,),) = cursor.fetchall()
            if min(number, rows) < len(self.fed):
                return None
            cursor.execute("SELECT body FROM vodpoller_events")
            return [body if isinstance(body, str) else json.dumps(body) for (body,) in cursor.fetchall()], number


def run(database, *, events, kills, seed, folder):
    """Feed events in portions; during each, the server or the daemon is killed."""
    kind, dialect = DATABASES[database]
    began_at = time.monotonic()
    with ending(kind()) as server, running_system(folder) as system:
        trial = Trial(system, server, dialect, seed)
        portion = events // (2 * kills)
        for _ in range(kills):
            trial.kill_server_during(portion)
            trial.kill_daemon_during(portion)
        trial.feed(events - 2 * kills * portion)
        return trial.result(kills, began_at)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=sorted(DATABASES), required=True)
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=10, help="number of kills of the server, and of the daemon")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run(
            options.database, events=options.events, kills=options.kills, seed=options.seed, folder=Path(folder)
        )
    sys.stdout.writelines(f"{name:12} {value}\n" for name, value in asdict(result).items())
    sys.exit(0 if result.is_clean else 1)


if __name__ == "__main__":
    main()
