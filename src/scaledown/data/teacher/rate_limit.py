"""Limits of requests: an adaptive limit and a circuit breaker for each server, and one rate for all."""

import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

log = logging.getLogger("scaledown")

FIRST_LIMIT: Final = 8
MOST_IN_FLIGHT: Final = 256

FAILURES: Final = 5
"""Consecutive failures after which a server is not used for a while."""
PAUSE: Final = 5.0
"""Seconds of the first pause of a server; doubled each time, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE: Final = 60.0
SLOW_PAUSE: Final = 1.0
"""Seconds of the first pause at a status 429 without Retry-After; doubled each time, until an answer."""
LONGEST_RETRY_AFTER: Final = 300.0
LOUD_WAIT: Final = 2.0
"""Seconds of a wait above which it is shown."""


class Fault(NamedTuple):
    """The failure of one request."""

    reason: str
    """The reason, for messages."""
    down: bool = False
    """The server seems to be down: counts towards a pause."""
    slow: bool = False
    """The server is overloaded: send it fewer requests at a time."""
    wait: float = 0.0
    """Seconds to wait before the next request, as the server demands."""


class Endpoint:
    """One server. Its limit grows by one per window of successes, and halves when it is overloaded (AIMD).

    After `FAILURES` consecutive failures it is not used for a pause; then one request probes it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.limit = FIRST_LIMIT
        self.running = 0
        self.paused = False
        """Whether it is not used, or being probed."""
        self.reason = ""
        """The reason for the last wait."""
        self._sent = 0
        self._sent_when_halved = 0
        self._sent_when_paused = 0
        self._good = 0
        self._failures = 0
        self._pause = 0.0
        self._slow_pause = 0.0
        self._until = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until a request may start; infinite while others must end first."""
        if self.running >= (1 if self.paused else self.limit):
            return float("inf")
        return max(0.0, self._until - now)

    def begin(self) -> int:
        """Count a request that starts. Returns its ticket."""
        self.running += 1
        self._sent += 1
        return self._sent

    def cancel(self) -> None:
        """Count a request that ended without a known result."""
        self.running -= 1

    def end(self, ticket: int, fault: Fault | None, now: float) -> None:
        """Count a request that ended, and adapt limit and pause to its result.

        Args:
            ticket: The number that `begin` returned for it.
            fault: Its failure; None for an answer.
            now: Seconds, by the monotonic clock.
        """
        self.running -= 1
        if fault and fault.slow and ticket > self._sent_when_halved:
            # Requests sent before the limit was halved do not count for the new limit.
            self.limit, self._good = max(1, self.limit // 2), 0
            self._sent_when_halved = self._sent
            if not (fault.down or fault.wait):  # 429 without Retry-After: halving alone ends at one at a time
                self._slow_pause = min(LONGEST_PAUSE, 2 * self._slow_pause or SLOW_PAUSE)
                self._until, self.reason = max(self._until, now + self._slow_pause), fault.reason
        if fault and fault.wait:
            if fault.wait >= LOUD_WAIT and self._until <= now:
                log.warning("%s wants %.0f s before the next request: %s", self.url, fault.wait, fault.reason)
            self._until, self.reason = max(self._until, now + fault.wait), fault.reason
        if fault and fault.down:
            self._failures += 1
            # Requests sent before the pause do not count for the time after it.
            if self._failures >= FAILURES and ticket > self._sent_when_paused and not fault.wait:
                self.leave_out(fault.reason, now)
            return
        self._failures = 0
        if self.paused:
            log.info("%s answers again", self.url)
            self.paused, self._pause, self._until = False, 0.0, now + (fault.wait if fault else 0.0)
        if fault is None:
            self._good += 1
            self._slow_pause = 0.0
            if self._good >= self.limit:
                self.limit, self._good = min(MOST_IN_FLIGHT, self.limit + 1), 0

    def leave_out(self, reason: str, now: float) -> None:
        """Begin a pause, in which no request is sent to the server.

        Args:
            reason: The reason, for the log.
            now: Seconds, by the monotonic clock.
        """
        self.paused = True
        self._pause = min(LONGEST_PAUSE, 2 * self._pause or PAUSE)
        self._until = max(self._until, now + self._pause)
        self._sent_when_paused = self._sent
        self._failures = max(self._failures, FAILURES)
        self.reason = reason
        log.warning("%s is left out for %.0f s: %s", self.url, self._pause, reason)


class Rate:
    """Spaces requests evenly, at most `per_minute` of them in a minute; 0 is no limit."""

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Return the seconds until the next request may start."""
        return max(0.0, self._next - now)

    def take(self, now: float) -> None:
        """Count a request that starts now."""
        self._next = max(now, self._next) + self._interval


def retry_after(value: str, most: float = LONGEST_RETRY_AFTER) -> float:
    """Return the seconds of a `Retry-After` header.

    Args:
        value: The header, a number or a date; may be empty.
        most: The largest result.

    Returns:
        Seconds; 0 if the header is missing, invalid or in the past.
    """
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(most, seconds) if seconds > 0 else 0.0
