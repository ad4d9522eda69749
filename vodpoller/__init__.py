"""vodpoller: the reliable-callback consumer for Tencent Cloud VOD.

The terms. Each has one meaning in the code, the log and the documentation:

event         one `EventContent` of VOD
batch         what one pull brought (0 to 16 events) with its lease, or one received callback
handle        the `EventHandle` of one pull, which confirms an event; never an identity
key           32 bytes, the event's identity for sinks, ledger and journal (see `vodpoller.events.identity`)
lease         the time in which a handle can be confirmed; it starts when the pull was sent
puller        a thread that pulls and processes batches; it needs a *permit* for each pull
outcome       the result of one event at one sink, with its reason
settlement    what is done with one event, with its reason: CONFIRM (every sink has it), STORE (write it down, then
              confirm) or LEAVE (do not confirm; VOD delivers it again)
stored event  an (event, sink) in the journal: *pending* (it is tried again) or a *dead letter* (it waits for
              the operator)
journal       our store of stored events and of the *ledger*, the (key, sink) pairs that were accepted; systemd's log is
              always called *journald*
"""

__version__ = "0.1.0"
