"""What vodpoller costs and yields, beside the loop that a user would write with the official SDK.

    python -m tests.benchmarks                                all rows, on stdout as markdown; about ten minutes
    python -m tests.benchmarks --full                         also backlogs of 1,000,000 events
    python -m tests.benchmarks --rows quota,zero --secs 5     some rows, each measured for so long
    python -m tests.benchmarks --repeats 3                    medians, where the machine is not still
    python -m tests.benchmarks --rows confirm --secs 30 --repeats 2 --baseline ../other/.venv/bin/vodpoller
                                                              beside another version, in turns, on one simulator
    python -m tests.benchmarks --rows backlog,stored,recover --repeats 3 --baseline ../other/.venv/bin/vodpoller
                                                              what is stored already: delivered, looked at, recovered
    python -m tests.benchmarks --quick                        seconds instead of minutes: shows that it works, no more

The last two columns say whether to believe a line: the simulator must be far from a whole core, and nothing else may
have used much of the machine (the reader of the sink's file and a webhook's receiver do, a little).

Each measurement has a simulator of its own, `vodpoller simulate`, and one consumer, each in its own process, and begins
with empty files. The consumers are `vodpoller run` as it is installed (file sink with sync, ledger, dedupe, routing,
one log line an event) and the loop: pull, append JSON lines with flush and fsync (or, beside a webhook, post each event
by `requests.Session`), confirm, with one thread or sixteen.

Between two moments of the steady state, so that the start does not count, these are read: what the simulator says was
confirmed, asked and refused (in any second that has just passed), and the CPU time of the consumer's and of the
simulator's process (user and system, /proc/PID/stat). Peak memory is VmHWM of /proc/PID/status.

Birth is in the first `Url` of generated snapshot events (`?born=`). Birth to sink: a thread reads the sink's file as it
grows, every 0.5 ms, and notes when each line could be read; that is the write, before the sync. Birth to confirm: from
the simulator's ledger, of the events that were born within the measurement. Where a backlog is drained all events were
born long before, so there is no latency to tell.

`--baseline` names the program of another version, from the environment of a checkout of its own (`git worktree add`).
It gets the same configuration, on the simulator of this version. The rows `confirm` and `backlog` print the ratios.

A journal that is full at the start is made as version 0.1 left it, so that every version can open it; the start that
counts is the one after it was brought along. Events per second of the row `backlog` are from the receiver's first
request to its last, its CPU from the daemon's first delivery until the journal is empty.

The row `callbacks` has no simulator: `callers.py` posts events, each on a connection of its own, as many at once as the
line says, and times the answers. The daemon's socket is passed to it, as systemd does.

`rows.py`, `stored.py` and `callbacks.py` say what is measured, `effort.py` how much of it; `consumers.py` starts the
processes, `measuring.py` reads the numbers, `report.py` writes them down; `sdk_loop.py`, `raw_client.py`, `callers.py`
and `receiver.py` are programs of their own.
"""
