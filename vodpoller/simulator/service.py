"""The VOD event API on loopback, to try, test and measure a consumer without an account.

It answers `PullEvents`, `ConfirmEvents`, `DescribeEventConfig` and `DescribeEventsState` (version 2018-07-17) as
Tencent Cloud documents them (product/266/34183, 266/34184, 266/57589; signature v3 in product/266/38490): long polls,
leases, new handles at each redelivery, quotas and errors. Signatures are verified by independent code, so that a
mistake of the client is found. Faults of networks and services can be switched on, each with a probability.

`Simulator` runs it in a background thread, `serve` in the main thread of a command.
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
    """Runs the API in a background thread of this process, without signal handlers. It is a context manager.

    While it runs, `feed`, `control`, `stats` and `ledger` may be called from any thread; after it was stopped, `stats`
    and `ledger`.

    Args:
        options: The options; None: the defaults.
        log: Gets a debug line for each answer; None: no lines.
        warn: Called with a text about a client that does not send HTTP.
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
            OSError: The address cannot be used, or the events' file cannot be read.
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
        """End all connections and the thread. Further calls do nothing."""
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
            bodies: Callback bodies, one per event, which are sent unchanged.

        Returns:
            Their number.
        """
        texts = [body.encode() if isinstance(body, str) else body for body in bodies]
        return self._call(lambda: self._api.feed(texts))

    def control(self, **changes: Any) -> None:
        """Change options of `CONTROLLABLE`; `faults` may be a string, as `parse_faults` reads it.

        Raises:
            ValueError: An option is unknown, cannot be changed while running, or has an invalid value.
        """
        self._call(lambda: self._api.control(changes))

    def stats(self) -> dict[str, Any]:
        """The statistics so far; `GET /_stats` returns the same.

        Returns:
            Pulls: `pulls` that were answered, `pulls_empty` among them, `pulls_abandoned` (the client ended the
            connection before an answer) and `pulls_hanging_now` (not answered yet).
            Confirms: `confirms` that succeeded, `confirms_stale`, and `confirms_forgotten`: handles that
            `forget_confirms` refused, each counted once.
            Requests: `requests` by action, `errors` by code, `faults` by action and name, `refused_by_limit`,
            `bad_requests` that were not HTTP/1.1, `connections_now`, `credentials_issued` (temporary keys), and
            `peak_requests_per_sec` by action: the maximum in any second, refused requests included.
            Pushes: `pushes`, `pushes_unanswered` among them, `push_answers` by status, `pushing_now`.
            Events: `fed`, the sum of `confirmed` (or answered), `outstanding` (leased, or being pushed), `visible` and
            `lost` (no push was answered); `redeliveries`; `feeding`: whether `rate` still adds events; percentiles of
            `birth_to_first_pull_secs` and `birth_to_confirm_secs` (or to the answer of a push), the times since an
            event was added, of the latest 20,000 events.
        """
        return self._call(self._api.stats)

    def ledger(
        self, *, start: int = 0, count: int | None = None, bodies: bool = False, lost: bool = False
    ) -> list[LedgerRow]:
        """The state of each event; `GET /_ledger?from=START&n=COUNT&bodies=1&lost=1` returns the same.

        Args:
            start: Number of events to skip at the beginning.
            count: Maximum number of events; None: all.
            bodies: Whether the rows have the bodies.
            lost: Whether only lost events are included: VOD would have lost them, since no push was answered.
        """
        return self._call(lambda: self._api.ledger(start=start, count=count, bodies=bodies, lost=lost))

    def _call(self, function: Callable[[], _T]) -> _T:
        """Call a function in the event loop, or directly if the loop has ended."""
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
        options: The options.
        log: Gets a debug line for each answer; None: no lines.
        ready: Called with the base URL once connections are accepted.
        warn: Called with a text about a client that does not send HTTP.

    Returns:
        The events that VOD would have lost, with their bodies: none of their pushes was answered.

    Raises:
        OSError: The address cannot be used, or the events' file cannot be read.
    """

    async def serve_here() -> list[LedgerRow]:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        api = Api(options, log, warn)
        await api.run(ready, stop)
        return api.ledger(start=0, count=None, bodies=True, lost=True)

    return asyncio.run(serve_here())
