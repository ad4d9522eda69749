"""The loop that a user would write with the official SDK: pull, append lines or post, confirm. A separate program.

It does only what at-least-once delivery needs: no dedupe, no routing, no log, and no retry except that VOD delivers
again.
"""

import argparse
import json
import os
import threading
import time
import uuid
from contextlib import ExitStack
from pathlib import Path

import requests
from tencentcloud.common.common_client import CommonClient
from tencentcloud.common.credential import Credential
from tencentcloud.common.exception.tencent_cloud_sdk_exception import TencentCloudSDKException
from tencentcloud.common.profile.client_profile import ClientProfile
from tencentcloud.common.profile.http_profile import HttpProfile

from tests.processes import SECRET_ID, SECRET_KEY

PAUSE_SECS = 0.1


def make_client(endpoint):
    http = HttpProfile(protocol="http", endpoint=endpoint, keepAlive=True, reqTimeout=10)
    return CommonClient("vod", "2018-07-17", Credential(SECRET_ID, SECRET_KEY), "", ClientProfile(httpProfile=http))


def appending(file, lock):
    """Delivers to a file."""

    def deliver(events):
        with lock:
            file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
            file.flush()
            os.fsync(file.fileno())

    return deliver


def posting(url):
    """Delivers to a webhook, one request for each event."""
    session = requests.Session()

    def deliver(events):
        for event in events:
            session.post(url, json=event, headers={"webhook-id": uuid.uuid4().hex}, timeout=10).raise_for_status()

    return deliver


def loop(client, deliver):
    while True:
        try:
            events = client.call_json("PullEvents", {})["Response"].get("EventSet")
            if events:
                handles = [event.pop("EventHandle") for event in events]
                deliver(events)
                client.call_json("ConfirmEvents", {"EventHandles": handles})
        except (TencentCloudSDKException, requests.RequestException):
            time.sleep(PAUSE_SECS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="host:port of the simulator")
    to = parser.add_mutually_exclusive_group(required=True)
    to.add_argument("--path", type=Path, help="the file that gets the events")
    to.add_argument("--url", help="the webhook that gets them")
    parser.add_argument("--threads", type=int, default=1, help="number of threads, each with its own client")
    options = parser.parse_args()
    with ExitStack() as stack:
        if options.path:
            file = stack.enter_context(options.path.open("a", encoding="utf-8"))
            deliver = appending(file, threading.Lock())
        threads = [
            threading.Thread(
                target=loop, args=(make_client(options.endpoint), deliver if options.path else posting(options.url))
            )
            for _ in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
