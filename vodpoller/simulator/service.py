"""The VOD event API on loopback: what a consumer can be tried, tested and measured against without an account.

It answers `PullEvents`, `ConfirmEvents`, `DescribeEventConfig` and `DescribeEventsState` (version 2018-07-17) as
Tencent Cloud documents them (product/266/34183, 266/34184, 266/57589; signature v3 in product/266/38490): long polls,
leases, new handles at each redelivery, quotas and errors. Signatures are verified by code of its own, so that agreement
with a client means something. The faults of networks and services can be switched on, each with its probability.

`Simulator` serves it from a background thread, `serve` from the main thread of a command.
"""

import asyncio
import signal
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from vodpoller.logs import Logger
from vodpoller.simulator.api import Api
from vodpoller.simulator.options import SimulatorOptions
from vodpoller.simulator.queue import LedgerRow

_T = TypeVar("_T")


class Simulator:
    """Runs the API in a background thread of this process; installs no signal handlers. A context manager.

    `feed`, `control`, `stats` and `ledger` may be called from any thread while it runs; `stats` and `ledger` also
    after it was stopped.

    Args:
        options: How it behaves; None for the defaults.
        log: Gets a debug line for each answer.
        warn: Told what is wrong with a client that does not even speak HTTP.
    """

    def __init__(
        self,
        options: SimulatorOptions | None = None,
        log: Logger | None = None,
        warn: Callable[[str], None] = lambda _message: None,
    ) -> None:
        self._api = Api(options or SimulatorOptions(), log, warn)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._url = ""

    @property
    def url(self) -> str:
        """The base URL, `http://HOST:PORT`; empty before `start`."""
        return self._url

    def start(self) -> str:
        """Start serving.

        Returns:
            The base URL. Connections are accepted from now on.

        Raises:
            OSError: The address cannot be listened on, or the events' file cannot be read.
        """
        started: Future[str] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="simulator", daemon=True)
        self._thread.start()
        self._url = started.result()
        return self._url

    def _run(self, started: Future[str]) -> None:
        async def serve_here() -> None:
            self._loop = asyncio.get_running_loop()
            try:
                await self._api.run(started.set_result, self._stop)
            finally:
                self._loop = None

        try:
            asyncio.run(serve_here())
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    def stop(self) -> None:
        """Cut all connections and end the thread. Further calls do nothing."""
        loop, thread, self._thread = self._loop, self._thread, None
        if thread is None:
            return
        if loop is not None:
            loop.call_soon_threadsafe(self._stop.set)
        thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def feed(self, bodies: Iterable[bytes | str]) -> int:
        """Put events into the queue.

        Args:
            bodies: Callback bodies, one an event, passed on as they are.

        Returns:
            Their number.
        """
        texts = [body.encode() if isinstance(body, str) else body for body in bodies]
        return self._call(lambda: self._api.feed(texts))

    def control(self, **changes: Any) -> None:
        """Change options of `CONTROLLABLE`; `faults` may be a string, as `parse_faults` reads it.

        Raises:
            ValueError: An option is unknown, or cannot be changed while running, or has no such value.
        """
        self._call(lambda: self._api.control(changes))

    def stats(self) -> dict[str, Any]:
        """What has happened so far; `GET /_stats` answers the same.

        Returns:
            `pulls` that were answered, `pulls_empty` among them, `pulls_abandoned` by their clients while they hung,
            `pulls_hanging_now`; `confirms` that succeeded and `confirms_stale`; `refused_by_limit`; `requests` by
            action, `errors` by code, `faults` by action and name, `bad_requests` that were not HTTP/1.1;
            `credentials_issued`, temporary keys;
            `peak_requests_per_sec` by action, over any second, refused ones included; `connections_now`; `feeding`:
            whether `rate` still brings events; `pushes`, `pushes_unanswered` among them, `push_answers` by status,
            `pushing_now`; `fed`, divided into `confirmed` (or answered), `outstanding` (leased, or being pushed),
            `visible` and `lost` (no push was answered); `redeliveries`; `confirms_forgotten`: handles that
            `forget_confirms` refused, each counted once; percentiles `birth_to_first_pull_secs` and
            `birth_to_confirm_secs` (or answer) of the latest 20,000 events.
        """
        return self._call(self._api.stats)

    def ledger(
        self, *, start: int = 0, count: int | None = None, bodies: bool = False, lost: bool = False
    ) -> list[LedgerRow]:
        """What became of each event; `GET /_ledger?from=START&n=COUNT&bodies=1&lost=1` answers the same.

        Args:
            start: The number of events to leave out at the beginning.
            count: The number to tell of; None for all.
            bodies: Tell their bodies, too.
            lost: Tell only of those that VOD would have lost: no push was answered.
        """
        return self._call(lambda: self._api.ledger(start=start, count=count, bodies=bodies, lost=lost))

    def _call(self, function: Callable[[], _T]) -> _T:
        """Run something where the queue lives: in the loop while there is one."""
        loop = self._loop
        if loop is None:
            return function()
        answer: Future[_T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 - raised again in the caller's thread
                answer.set_exception(error)

        loop.call_soon_threadsafe(run)
        return answer.result()


def serve(
    options: SimulatorOptions,
    log: Logger | None,
    ready: Callable[[str], None],
    warn: Callable[[str], None] = lambda _message: None,
) -> list[LedgerRow]:
    """Serve from the main thread until SIGINT or SIGTERM.

    Args:
        options: How it behaves.
        log: Gets a debug line for each answer.
        ready: Called with the base URL once connections are accepted.
        warn: Told what is wrong with a client that does not even speak HTTP.

    Returns:
        The events that VOD would have lost, with their bodies: none of their pushes was answered.

    Raises:
        OSError: The address cannot be listened on, or the events' file cannot be read.
    """

    async def serve_here() -> list[LedgerRow]:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        api = Api(options, log, warn)
        await api.run(ready, stop)
        return api.ledger(start=0, count=None, bodies=True, lost=True)

    return asyncio.run(serve_here())
