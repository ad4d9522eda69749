"""The temporary key of a role, renewed in a separate thread so that requests never wait for the renewal.

`Refresher.step` does the work that is due and returns the time until its next call; the thread calls it.
"""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from random import SystemRandom
from typing import Any, Final, assert_never

from vodpoller.backoff import Backoff
from vodpoller.errors import NO_KEY_RETRY_SECS, NoKeyError, OperatorError, TransientError, VodpollerError
from vodpoller.liveness import Liveness
from vodpoller.status import CredentialsStatus
from vodpoller.telemetry import Count, Telemetry
from vodpoller.vod.credentials import AssumedRole, Credentials, CvmRole, IssuedKey, IssuedKeys, Role, StaticCredentials
from vodpoller.vod.issuers import Issuer, MetadataService, Sts

RENEWAL_SHARE: Final = 2 / 3  # of a key's lifetime: the latest time of the renewal
JITTER_SHARE: Final = 0.1  # of its lifetime: a renewal may be this much earlier, so that machines do not ask together
EXPIRING_SHARE: Final = 1 / 6  # of its lifetime: if a failing key has no more left, this is logged as an error
RENEWAL_MIN_SECS: Final = 1.0
OVERDUE_SECS: Final = 30.0  # an attempt that takes longer is overdue; its own limit is 10 s


def renewal_secs(life_secs: float, draw: float) -> float:
    """The time between the issue of a key and its renewal.

    Args:
        life_secs: The time for which the key is valid.
        draw: A random number from 0 to 1.
    """
    return max(life_secs * (RENEWAL_SHARE - JITTER_SHARE * draw), RENEWAL_MIN_SECS)


class Refresher:
    """Provides the temporary key of a role, and renews it.

    An issued key stays in use until it ends, even if its renewal fails. The threads of requests read the key in use,
    which is replaced as a whole. `_due_lock` protects the fields that `refused` and `wake` write to bring the next
    attempt forward; all other fields are written by the thread that holds `_attempt_lock`.

    Args:
        issuer: Issues keys.
        provider: `credentials.provider`, for log lines and the status.
        keys: The key in use, and the former keys, which are hidden; may already hold a key from before a reload.
        telemetry: Destination of log lines and counts.
        on_operator_error: Called if only the operator can end the cause of a failed renewal; reads the permanent key
            again.
        on_recovered: Called if requests failed because there was no key, and a key is there now.
        liveness: Records each attempt, for the watchdog.
        monotonic: The monotonic clock, in seconds.
        wall: The clock of times that are shown, in seconds since 1970.
        draw: Returns a random number from 0 to 1.
    """

    _BACKOFF = Backoff(first_secs=1.0, max_secs=60.0)

    def __init__(
        self,
        issuer: Issuer,
        *,
        provider: str,
        keys: IssuedKeys,
        telemetry: Telemetry,
        on_operator_error: Callable[[], None] = lambda: None,
        on_recovered: Callable[[], None] = lambda: None,
        liveness: Liveness | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
        draw: Callable[[], float] | None = None,
    ) -> None:
        self._issuer = issuer
        self._provider = provider
        self._keys = keys
        self._telemetry = telemetry.scope()
        self._on_operator_error = on_operator_error
        self._on_recovered = on_recovered
        self._liveness = liveness or Liveness()
        self._monotonic = monotonic
        self._wall = wall
        self._draw = draw or SystemRandom().random
        self._attempt_lock = threading.Lock()
        self._has_tried = keys.in_use is not None
        self._due_at = self._attempted_at = monotonic()
        self._failures = 0
        self._problem: VodpollerError | None = None
        self._failing_since: float | None = None
        self._logged_expiring: IssuedKey | None = None
        self._due_lock = threading.Lock()
        self._refused_token = ""
        self._refusals = 0
        self._woken = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # --- called for requests ------------------------------------------------------------------------------------------

    def __call__(self) -> Credentials:
        """The current key. The only wait is for the end of the first attempt to get a key.

        Raises:
            NoKeyError: The key is missing or has ended.
        """
        if not self._has_tried:
            with self._attempt_lock:
                if not self._has_tried:
                    self._attempt()
        in_use = self._keys.in_use
        if in_use is not None and self._monotonic() < in_use.ends_at:
            return in_use.credentials
        state = "no temporary key was issued yet" if in_use is None else "the temporary key has ended"
        # The text does not contain why a new key is missing: that may change with each attempt, and the texts must be
        # equal to count as one cause.
        raise NoKeyError(
            f"nothing was sent: {state}, and no new one was issued (see credentials.failed, or `vodpoller status`)",
            retry_after_secs=NO_KEY_RETRY_SECS,
        )

    def refused(self, token: str) -> None:
        """Renew the key because VOD refused its token; not if another key is already in use. Returns at once.

        Args:
            token: The token of the refused request.
        """
        with self._due_lock:
            in_use = self._keys.in_use
            if in_use is None or in_use.credentials.token != token or self._refused_token == token:
                return
            self._refused_token = token
            # If one key after another is refused, new ones must not be requested in a tight loop.
            wait_secs = self._BACKOFF.secs(self._refusals) if self._refusals else 0.0
            self._refusals += 1
            self._due_at = min(self._due_at, self._attempted_at + wait_secs)
        self._woken.set()

    # --- renewing -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread that renews."""
        self._thread = threading.Thread(target=self._run, name="credentials", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Renew now, because the operator asks for it: the role may have changed, or the cause of a failure ended."""
        with self._due_lock:
            self._failures = 0
            self._due_at = self._monotonic()
        self._telemetry.reset()
        self._woken.set()

    def stop(self) -> None:
        """Stop renewing; returns at once. A running attempt ends within its time limit."""
        self._stopping = True
        self._woken.set()
        self._issuer.close()

    def reopen(self) -> None:
        """As `Issuer.reopen`."""
        self._issuer.reopen()

    def _run(self) -> None:
        while not self._stopping:
            self._woken.wait(self.step())
            self._woken.clear()  # before `_stopping` is checked, so that a stop in between is noticed

    def step(self) -> float:
        """Do the work that is due.

        Returns:
            The time in seconds until the next work is due, unless a token is refused before.
        """
        with self._attempt_lock:
            if self._monotonic() >= self._due_at and not self._stopping:
                self._liveness.begin("credentials", OVERDUE_SECS)
                try:
                    self._attempt()
                finally:
                    self._liveness.end()
        urgent_at = self._log_expiring()
        return max(min(self._due_at, urgent_at) - self._monotonic(), 0.0)

    def _attempt(self) -> None:
        try:
            issued = self._issuer()
        except VodpollerError as error:
            self._failed(error)
        except Exception as error:  # noqa: BLE001 - any error means that the new key is missing
            self._failed(TransientError(f"unexpected error: {type(error).__name__}"))  # its text may quote the key
        else:
            if self._stopping:
                return  # another refresher may already use these keys
            if self._refused_token == issued.credentials.token:
                self._failed(TransientError(f"the key of {issued.role} is still the one that VOD refuses"))
            else:
                self._succeeded(issued)
        finally:
            self._has_tried = True

    def _succeeded(self, issued: IssuedKey) -> None:
        now = self._monotonic()
        former = self._keys.in_use
        with self._due_lock:
            was_missing = (self._has_tried and former is None) or (former is not None and now >= former.ends_at)
            was_refused, self._refused_token = bool(self._refused_token), ""
            if not was_refused:
                self._refusals = 0
            self._failures = 0
            self._keys.take(issued)
            self._attempted_at = now
            self._due_at = now + renewal_secs(issued.life_secs, self._draw())
        self._problem, self._failing_since = None, None
        suppressed = self._telemetry.reset("renewal ")
        self._telemetry.count(Count.CREDENTIALS_REFRESHES, result="ok")
        is_same = former is not None and former.credentials == issued.credentials
        fields: dict[str, Any] = {"suppressed_lines": suppressed} if suppressed else {}
        fields |= {"role": issued.role, "provider": self._provider, "life_secs": round(issued.life_secs)}
        if is_same:
            self._telemetry.log.debug("credentials.refreshed", **fields)
        else:
            self._telemetry.log.info("credentials.refreshed", **fields)
        if was_missing or was_refused:
            self._on_recovered()

    def _failed(self, error: VodpollerError) -> None:
        now = self._monotonic()
        with self._due_lock:
            self._failures += 1
            wait_secs = self._BACKOFF.secs(self._failures)
            self._attempted_at = now
            self._due_at = now + wait_secs
        self._problem = error
        self._failing_since = now if self._failing_since is None else self._failing_since
        self._telemetry.count(Count.CREDENTIALS_REFRESHES, result="failed")
        in_use = self._keys.in_use
        left_secs = max(in_use.ends_at - now, 0.0) if in_use else 0.0
        self._telemetry.repeated(
            "error" if isinstance(error, OperatorError) or not left_secs else "warning",
            "credentials.failed",
            cause=f"renewal {type(error).__name__} {error.error_code or _without_numbers(str(error))}",
            provider=self._provider,
            left_secs=round(left_secs),
            retry_in_secs=round(wait_secs, 1),
            **error.fields(),
        )
        if isinstance(error, OperatorError):
            self._on_operator_error()

    def _log_expiring(self) -> float:
        """Log, once per key, that it ends soon and cannot be renewed. Returns the time of the next check."""
        in_use, problem = self._keys.in_use, self._problem
        if in_use is None or problem is None or self._logged_expiring is in_use:
            return self._due_at
        left_secs = in_use.ends_at - self._monotonic()
        urgent_secs = in_use.life_secs * EXPIRING_SHARE
        if left_secs > urgent_secs:
            return in_use.ends_at - urgent_secs
        self._logged_expiring = in_use
        self._telemetry.log.error(
            "credentials.expiring",
            **self._known(in_use),
            left_secs=round(max(left_secs, 0.0)),
            error_message=str(problem),
        )
        return self._due_at

    def _known(self, issued: IssuedKey) -> dict[str, Any]:
        return {"provider": self._provider, "role": issued.role}

    # --- status -------------------------------------------------------------------------------------------------------

    def status(self) -> CredentialsStatus:
        """The current status."""
        in_use, problem, since = self._keys.in_use, self._problem, self._failing_since
        now, wall_now = self._monotonic(), self._wall()
        left_secs = 0.0 if in_use is None else in_use.ends_at - now
        return CredentialsStatus(
            provider=self._provider,
            role="" if in_use is None else in_use.role,
            expires_at=None if in_use is None else wall_now + left_secs,
            is_usable=left_secs > 0,
            failing_since=None if since is None else wall_now - (now - since),
            error="" if problem is None else problem.message if isinstance(problem, OperatorError) else str(problem),
            remedy=problem.advice if isinstance(problem, OperatorError) else "",
        )


def _without_numbers(text: str) -> str:
    """A text that identifies a cause: that a key ended 5 s ago and that it ended 6 s ago are one cause."""
    return "".join(char for char in text if not char.isdigit())


def issuer_of(role: Role, *, key: StaticCredentials, key_renewal: str, ca_file: Path | None) -> tuple[str, Issuer]:
    """The name of a role's provider, and the issuer of its keys.

    Args:
        role: The role.
        key: The permanent key that assumes it.
        key_renewal: What the operator must do after replacing the permanent key, so that the new one is used.
        ca_file: PEM file with the root certificates for the certificate of STS.
    """
    match role:
        case CvmRole():
            return "cvm_role", MetadataService(role)
        case AssumedRole():
            return "assume_role", Sts(role, key=key, key_renewal=key_renewal, ca_file=ca_file)
        case _:
            assert_never(role)
