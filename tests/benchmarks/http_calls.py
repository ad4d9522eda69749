"""CPU time of an HTTP call on a kept connection: by vodpoller, by a baseline, and by `requests.Session`.

The row `http`, and the program that it runs: one process per round and client, alternating, all with the same request
to a simulator, which refuses it at once. It is a separate program so that another version's Python can run it.
"""

import argparse
import statistics
import subprocess
import sys
import time
from contextlib import closing

import requests

from vodpoller.httpclient.address import environment_of
from vodpoller.httpclient.transport import DeadlineAdapter

_ROUNDS = 3
_WARM_UP_CALLS = 100


def by_deadline_adapter(request):
    adapter, environment = DeadlineAdapter(connections=1), environment_of(request.url)

    def call():
        with closing(adapter.send_within(request, environment, 10.0, connect_secs=5.0)) as response:
            while response.raw.read1(65_536, decode_content=True):
                pass

    return call


def by_session(request):
    session = requests.Session()
    return lambda: session.send(request, timeout=(5.0, 10.0))


CLIENTS = {"vodpoller": by_deadline_adapter, "session": by_session}


def cpu_us_per_call(client, url, calls):
    # The same number of headers as a signed request.
    headers = {"X-TC-Action": "ConfirmEvents", "X-TC-Version": "2018-07-17", "X-TC-Timestamp": "1700000000"}
    more = {"Content-Type": "application/json", "Accept": "application/json", "Authorization": "x" * 200}
    body = b'{"EventHandles":["%b"]}' % (b"h" * 200)
    call = CLIENTS[client](requests.Request("POST", url, data=body, headers={**headers, **more}).prepare())
    for _ in range(_WARM_UP_CALLS):
        call()
    began_secs = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - began_secs) / calls * 1e6


def compared(url, calls, baseline):
    """Medians of the rounds, in microseconds, by client.

    Args:
        url: URL of a simulator without a request limit.
        calls: Number of calls in each round.
        baseline: The Python of another version's environment; None for none.
    """
    consumers = {"vodpoller": (sys.executable, "vodpoller")}
    if baseline is not None:
        consumers["vodpoller, baseline"] = (baseline, "vodpoller")
    consumers["requests.Session"] = (sys.executable, "session")
    found = {label: [] for label in consumers}
    for _ in range(_ROUNDS):
        for label, (python, client) in consumers.items():
            # -P: each process imports the vodpoller of its own environment.
            command = (python, "-P", __file__, "--client", client, "--url", url, "--calls", str(calls))
            ended = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[label].append(float(ended.stdout))
    return {label: statistics.median(values) for label, values in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--client", choices=CLIENTS, required=True)
    parser.add_argument("--url", required=True)
    parser.add_argument("--calls", type=int, required=True)
    options = parser.parse_args()
    sys.stdout.write(f"{cpu_us_per_call(options.client, options.url, options.calls)}\n")


if __name__ == "__main__":
    main()
