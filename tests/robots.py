"""A chat robot that accepts 20 messages per minute, for five minutes, while the daemon is reloaded and killed.

`python -m tests.robots` prints what arrived. The exit code is 0 only if no 60 s had more than 20 messages, at least 75%
of the possible messages were sent, and each event that was fed is sent, stored, or still unconfirmed at VOD.
"""

import json
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from tests.processes import run_command, running_system
from tests.receiver import Answer, Receiver, running_receiver

MINUTES = 5
PER_MINUTE = 20
LEASE_SECS = 30.0
KEYS = f"""
max_per_minute = {PER_MINUTE}
timeout_secs = 2
accept_when = "errcode == `0`"
body = "FileDeleteEvent.{{msgtype: 'text', text: {{content: FileIdSet[0]}}}}"
"""


class Robot(Receiver):
    """Records the arrival time of each message; every third answer is 0.7 s late."""

    def __init__(self):
        super().__init__()
        self.arrived_at = []

    def answer_to(self, received):
        self.arrived_at.append(time.monotonic())
        late = 0.7 if len(self.arrived_at) % 3 == 0 else 0.0
        return Answer(200, body=b'{"errcode":0,"errmsg":"ok"}', after_secs=late)


def run(folder):
    """Feed one event per second, three times the robot's limit; returns robot, number of stored events, stats."""
    with running_system(folder) as system, running_receiver(Robot()) as robot:
        simulator = system.simulator(visibility_secs=LEASE_SECS)

        def configure(concurrency):
            keys = f'url = "{robot.url}"\nconcurrency = {concurrency}\n{KEYS}'
            system.configure(simulator.url, lease_secs=LEASE_SECS, sinks=f'[sinks.robot]\ntype = "webhook"\n{keys}')

        configure(4)
        daemon = system.daemon()
        for second in range(MINUTES * 60):
            time.sleep(1)
            simulator.feed(
                json.dumps({"EventType": "FileDeleted", "FileDeleteEvent": {"FileIdSet": [f"file {second}"]}})
            )
            if second in (70, 130, 135):  # each time with another configuration, so that everything is rebuilt
                configure(second)
                assert run_command("reload", "-c", system.config_path, timeout_secs=60).returncode == 0
            if second in (180, 181, 240):
                daemon.kill()
                daemon = system.daemon()
        daemon.terminate()
        listed = run_command("deadletters", "list", "--pending", "--json", "-c", system.config_path)
        return robot, listed.stdout.count('"due_at"'), simulator.stats()


def main():
    with tempfile.TemporaryDirectory() as folder:
        robot, stored, stats = run(Path(folder))
    texts = [json.loads(received.body)["text"]["content"] for received in robot.received]
    most = max(sum(at <= other < at + 60 for other in robot.arrived_at) for at in robot.arrived_at)
    gaps = [later - earlier for earlier, later in pairwise(robot.arrived_at)]
    unconfirmed = stats["fed"] - stats["confirmed"]
    sys.stdout.write(
        f"{len(texts)} messages, {len(set(texts))} of them different, at most {most} in 60 s\n"
        f"between two messages {min(gaps):.2f} to {max(gaps):.2f} s\n"
        f"{stats['fed']} events were fed: {stored} are stored, {unconfirmed} are not confirmed\n"
    )
    is_kept = most <= PER_MINUTE and len(set(texts)) + stored + unconfirmed >= stats["fed"]
    return 0 if is_kept and len(texts) >= MINUTES * PER_MINUTE * 0.75 else 1


if __name__ == "__main__":
    sys.exit(main())
