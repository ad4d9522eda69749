"""Run all checks, one after the other."""

import os
import time
from collections.abc import Iterator

from vodpoller.checkup.callbacks import check_callbacks
from vodpoller.checkup.certificates import check_ca_files, check_endpoint
from vodpoller.checkup.disks import check_disks
from vodpoller.checkup.files import check_files
from vodpoller.checkup.finding import Finding, Level
from vodpoller.checkup.storage import check_journal, check_stored
from vodpoller.checkup.vod import check_clock, check_role, check_source
from vodpoller.config.model import Config
from vodpoller.errors import VodpollerError
from vodpoller.logs import Logger
from vodpoller.opened_sinks import context_of, refresher_of
from vodpoller.sinks.contract import Doubt
from vodpoller.telemetry import Telemetry
from vodpoller.vod.client import VodClient


def check_connections(config: Config, log: Logger) -> Iterator[Finding]:
    """Test all that the daemon needs: sources at VOD, the clock, the sinks, the journal. Consumes and writes nothing.

    Args:
        config: Valid.
        log: Destination of the log lines of clients and sinks.
    """
    refresher = refresher_of(config, Telemetry(log))
    if refresher is not None:
        yield check_role(refresher)
    vod = VodClient.configured(
        # No lease ends meanwhile, so an answer may take longer than in the daemon.
        config.api.model_copy(update={"confirm_timeout_secs": config.api.timeout_secs}),
        credentials=refresher or config.credentials,
        key_renewal=config.key_renewal,
        log=log,
    )
    try:
        for source in config.pulled if refresher is None or refresher.status().is_usable else ():
            yield from check_source(vod, source, config.routes)
        if config.pulled:
            yield check_clock(vod)
            yield from check_endpoint(vod, time.time())
    finally:
        vod.close()
        if refresher is not None:
            refresher.stop()
    for name, sink_class in config.sink_classes.items():
        try:
            text = sink_class.probe(name, config.sinks[name], context_of(name, config, log, refresher))
            level = Level.WARNING if isinstance(text, Doubt) else Level.GOOD
            yield Finding(what=f"sink {name}", level=level, text=text)
        except VodpollerError as error:
            yield Finding(what=f"sink {name}", level=Level.PROBLEM, text=str(error))
    yield from check_callbacks(config.callback_addresses)
    yield check_journal(config.journal.path)
    yield from check_stored(config)
    yield from check_disks(config)
    yield from check_files(config, as_root=os.geteuid() == 0)
    yield from check_ca_files(config, time.time())
