"""Throughput, latency and resource use of vodpoller, compared with a user's own loop around the official SDK.

    python -m tests.benchmarks                                all rows, on stdout as markdown; about ten minutes
    python -m tests.benchmarks --full                         also backlogs of 1,000,000 events
    python -m tests.benchmarks --rows quota,zero --secs 5     some rows, each measured for 5 s
    python -m tests.benchmarks --repeats 3                    medians, for a machine that is not idle
    python -m tests.benchmarks --rows confirm --secs 30 --repeats 2 --baseline ../other/.venv/bin/vodpoller
                                                              and another version, alternating, on one simulator
    python -m tests.benchmarks --rows backlog,stored,recover --repeats 3 --baseline ../other/.venv/bin/vodpoller
                                                              stored events: delivery, commands, recovery
    python -m tests.benchmarks --quick                        seconds instead of minutes: shows only that it works

The last two columns show whether a line is reliable: the simulator must use far less than a whole core, and other
processes must have used little CPU time (the reader of the sink's file and a webhook's receiver use a little).

Each measurement has a simulator of its own, `vodpoller simulate`, and one consumer, each in its own process, and begins
with empty files. The consumers are `vodpoller run` as it is installed (file sink with sync, ledger, dedupe, routing,
one log line per event) and the loop: pull, append JSON lines with flush and fsync (or, if a webhook is measured, post
each event by `requests.Session`), confirm, with one thread or sixteen.

A window of the steady state is measured, so that the start does not count. Read at its beginning and end: the
simulator's counts of confirmed events, requests and refused requests (the quota applies to the past second), and the
CPU time of the consumer's and of the simulator's process (user and system, /proc/PID/stat). Peak memory is VmHWM of
/proc/PID/status.

The time of birth is in the first `Url` of generated snapshot events (`?born=`). Birth to sink: a thread reads the
growing file of the sink every 0.5 ms and records when each line can be read; that is after the write, before the sync.
Birth to confirm: from the simulator's ledger, for the events that were born within the window. If a backlog is drained,
all events were born long before, so that no latency is reported.

`--baseline` names the program of another version, from the environment of a checkout of its own (`git worktree add`).
It gets the same configuration, on the simulator of this version. The rows `confirm` and `backlog` print the ratios.

A journal that is full at the start is made in the form of version 0.1, so that every version can open it; the first
start migrates it, and the second one is measured. In the row `backlog`, events per second are counted from the
receiver's first request to its last, and CPU time from the daemon's first delivery until the journal is empty.

The row `callbacks` has no simulator: `callers.py` posts events, each on its own connection, with the concurrency that
the line gives, and measures the time to each answer. The daemon gets its socket from the parent, as from systemd.

`rows.py`, `stored.py`, `listening.py` and `callbacks.py` define what is measured, `effort.py` how much; `consumers.py`
starts the processes, `measuring.py` reads the numbers, `report.py` prints them; `sdk_loop.py`, `sql_loop.py`,
`http_calls.py`, `raw_client.py`, `callers.py` and `receiver.py` are separate programs.
"""
