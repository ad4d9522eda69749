"""The loop that a user would write for a table: pull, INSERT and COMMIT each event, confirm. A separate program."""

import argparse
import hashlib
import json
import time

import psycopg
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException

from tests.benchmarks.sdk_loop import PAUSE_SECS, make_client

INSERT = (
    "INSERT INTO vodpoller_events (key, source, event_type, received_at, body) VALUES (%s, 'main', %s, now(), %s)"
    " ON CONFLICT (key) DO NOTHING"
)


def loop(client, db):
    while True:
        try:
            events = client.call_json("PullEvents", {})["Response"].get("EventSet")
            if events:
                handles = [event.pop("EventHandle") for event in events]
                for event in events:
                    body = json.dumps(event, ensure_ascii=False)
                    key = hashlib.sha256(body.encode()).hexdigest()
                    db.execute(INSERT, (key, event.get("EventType", ""), body))
                    db.commit()
                client.call_json("ConfirmEvents", {"EventHandles": handles})
        except TencentCloudSDKException:
            time.sleep(PAUSE_SECS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="host:port of the simulator")
    parser.add_argument("--dsn", required=True, help="address of a database that has the table vodpoller_events")
    options = parser.parse_args()
    with psycopg.connect(options.dsn) as db:
        loop(make_client(options.endpoint), db)


if __name__ == "__main__":
    main()
