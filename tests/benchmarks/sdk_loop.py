"""The loop that a user would write with the official SDK: pull, append JSON lines, confirm. A program of its own.

It does what it must for at-least-once delivery to a file, and no more: no dedupe, no routing, no log, no retries but
the next turn.
"""

import argparse
import json
import os
import threading
import time
from pathlib import Path

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


def loop(client, file, lock):
    while True:
        try:
            events = client.call_json("PullEvents", {})["Response"].get("EventSet")
            if events:
                handles = [event.pop("EventHandle") for event in events]
                with lock:
                    file.writelines(json.dumps(event, ensure_ascii=False) + "\n" for event in events)
                    file.flush()
                    os.fsync(file.fileno())
                client.call_json("ConfirmEvents", {"EventHandles": handles})
        except TencentCloudSDKException:
            time.sleep(PAUSE_SECS)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--endpoint", required=True, help="host:port of the simulator")
    parser.add_argument("--path", required=True, type=Path, help="the file that gets the events")
    parser.add_argument("--threads", type=int, default=1, help="each with a client of its own")
    options = parser.parse_args()
    lock = threading.Lock()
    with options.path.open("a", encoding="utf-8") as file:
        threads = [
            threading.Thread(target=loop, args=(make_client(options.endpoint), file, lock))
            for _ in range(options.threads)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


if __name__ == "__main__":
    main()
