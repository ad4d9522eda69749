"""Normal callbacks: each event is posted to a URL until it is answered, up to a maximum number of tries.

The body is that of a pulled event without its handle (Tencent Cloud's event overview, product/266/33948). An archived
version of that page says that VOD ignores status and body of the answer, waits 5 s for it, and sends an event three
times at most. Not documented are: when the next try begins (here: as soon as one has ended without an answer), whether
VOD tries again after a broken connection (here: yes), whether it reuses connections (here: no), and whether `T` is a
number or a string (here: chosen at random).
"""

import asyncio
import hashlib
import re
import resource
from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

import orjson

from vodpoller.simulator.bodies import with_members
from vodpoller.simulator.options import Fault, SimulatorOptions
from vodpoller.simulator.queue import EventQueue
from vodpoller.simulator.server import reset

_SIGN_AHEAD_SECS: Final = 600  # `T` is this far ahead
_RESERVED_FILES: Final = 200  # open files of this process that are not pushes
_CONCURRENT_MAX: Final = 20_000
_STARTS_PER_TURN: Final = 50
_STATUS: Final = re.compile(rb"HTTP/1\.[01] ([1-5][0-9][0-9])[ \r]")
_FINAL_STATUS: Final = 200  # lower ones announce a further status (RFC 9110, section 15.2)


class Pusher:
    """Pushes the events of the queue while the options say so, in the running event loop.

    Args:
        options: Returns the current options.
        queue: The queue.
        random: Source of the choices that are not documented.
        draw_fault: Returns the fault of the next try; None: no fault.
        now: Unix time, in seconds.
    """

    def __init__(
        self,
        options: Callable[[], SimulatorOptions],
        queue: EventQueue,
        *,
        random: Random,
        draw_fault: Callable[[], Fault | None],
        now: Callable[[], float],
    ) -> None:
        self._options = options
        self._queue = queue
        self._random = random
        self._draw_fault = draw_fault
        self._now = now
        self._limit = 0
        self._is_scheduled = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._pushes = 0
        self._unanswered = 0
        self._answers: Counter[int] = Counter()

    # --- running ---

    def start(self) -> None:
        """Enable `push`."""
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        unlimited = files == resource.RLIM_INFINITY
        self._limit = _CONCURRENT_MAX if unlimited else max(min(files - _RESERVED_FILES, _CONCURRENT_MAX), 1)

    async def stop(self) -> None:
        """End all pushes."""
        self._limit = 0
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def push(self) -> None:
        """Begin to push all visible events."""
        if self._limit and not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_pushes)

    def _start_pushes(self) -> None:
        """Start a few pushes, then let the loop read answers: new pushes must not use up the time of others."""
        self._is_scheduled = False
        options = self._options()
        if options.push is None or not options.has_push_mode:
            return
        for _ in range(min(_STARTS_PER_TURN, self._limit - len(self._tasks))):
            number = self._queue.take_to_push()
            if number is None:
                return
            task = asyncio.get_running_loop().create_task(self._push(number, options.push))
            self._tasks.add(task)
            task.add_done_callback(self._ended)
        if len(self._tasks) < self._limit:
            self.push()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.remove(task)
        self.push()

    def stats(self) -> dict[str, Any]:
        """The part of `Simulator.stats` about pushes."""
        return {
            "pushes": self._pushes,
            "pushes_unanswered": self._unanswered,
            "push_answers": {str(status): count for status, count in sorted(self._answers.items())},
            "pushing_now": len(self._tasks),
        }

    # --- one event ---

    async def _push(self, number: int, url: str) -> None:
        faults_left = self._options().push_tries - 1
        for _ in range(self._options().push_tries):
            fault = self._draw_fault() if faults_left else None
            faults_left -= fault is not None
            self._queue.count_delivery(number)
            if await self._is_answered(url, self._queue.body(number), fault):
                self._queue.mark_answered(number)
                return
        self._queue.mark_lost(number)

    async def _is_answered(self, url: str, body: bytes, fault: Fault | None) -> bool:
        self._pushes += 1
        try:
            async with asyncio.timeout(self._options().push_limit_secs):
                status = await self._post(url, body, fault)
        except (OSError, EOFError, asyncio.LimitOverrunError):
            self._unanswered += 1
            return False
        self._answers[status] += 1
        return True

    async def _post(self, url: str, body: bytes, fault: Fault | None) -> int:
        """Send the body and wait for the answer's status.

        Raises:
            OSError: The connection breaks, or the answer is not HTTP.
            EOFError: The connection ends before the answer.
            asyncio.LimitOverrunError: The answer's head has no end.
        """
        parts = urlsplit(url)
        has_tls = parts.scheme == "https"
        port = parts.port or (443 if has_tls else 80)
        reader, writer = await asyncio.open_connection(parts.hostname, port, ssl=has_tls or None)
        try:
            request = _request(parts, self._signed(body))
            if fault == "reset":
                writer.write(request[: self._random.choice((len(request) // 2, len(request)))])
                reset(writer.transport)
                raise ConnectionResetError
            writer.write(request)
            if fault == "lost":
                await asyncio.get_running_loop().create_future()  # until the time limit
            status = await _status(reader)
            if fault == "slow":
                await asyncio.sleep(self._options().slow_secs)
            return status
        finally:
            writer.close()

    def _signed(self, body: bytes) -> bytes:
        key = self._options().push_sign_key
        if key is None:
            return body
        expires = int(self._now()) + _SIGN_AHEAD_SECS
        sign = hashlib.md5(f"{key}{expires}".encode(), usedforsecurity=False).hexdigest()
        members = {"Sign": sign, "T": self._random.choice((expires, str(expires)))}
        return with_members(body, orjson.dumps(members)[1:-1])


def _request(url: SplitResult, body: bytes) -> bytes:
    target = url._replace(scheme="", netloc="", path=url.path or "/", fragment="").geturl()
    head = f"POST {target} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def _status(reader: asyncio.StreamReader) -> int:
    while True:
        head = await reader.readuntil(b"\r\n\r\n")
        found = _STATUS.match(head)
        if found is None:
            raise ConnectionError("the answer is not HTTP")
        if (status := int(found[1])) >= _FINAL_STATUS:
            return status
