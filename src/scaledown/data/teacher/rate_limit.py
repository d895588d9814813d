"""How many requests a server gets, and when: adaptive limits, circuit breakers, one rate over all."""

import logging
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final, NamedTuple

log = logging.getLogger("scaledown")

FIRST_LIMIT: Final = 8
MOST_IN_FLIGHT: Final = 256

FAILURES: Final = 5
"""In a row, after which a server is left out."""
PAUSE: Final = 5.0
"""Seconds that it is left out for at first; doubled each time, up to `LONGEST_PAUSE`."""
LONGEST_PAUSE: Final = 60.0
LONGEST_RETRY_AFTER: Final = 300.0
LOUD_WAIT: Final = 2.0
"""Seconds of a wait from which on it is told."""


class Fault(NamedTuple):
    """What went wrong with one request."""

    reason: str
    down: bool = False
    """The server failed as a whole would: it counts towards leaving it out."""
    slow: bool = False
    """The server has too much to do: fewer requests at once."""
    wait: float = 0.0
    """Seconds that the server asks for before the next request."""


class Endpoint:
    """One server: its limit grows by one per window of successes and halves when it is overloaded (AIMD).

    After `FAILURES` in a row it is left out for a pause, then one request probes whether it is back.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.limit = FIRST_LIMIT
        self.running = 0
        self.paused = False
        """Left out, or probed."""
        self.reason = ""
        """Of the last wait."""
        self._sent = 0
        self._sent_when_halved = 0
        self._sent_when_paused = 0
        self._good = 0
        self._failures = 0
        self._pause = 0.0
        self._until = 0.0

    def wait(self, now: float) -> float:
        """Seconds until a request may start; infinite while others must end first."""
        if self.running >= (1 if self.paused else self.limit):
            return float("inf")
        return max(0.0, self._until - now)

    def begin(self) -> int:
        """Count a request in; gives its ticket."""
        self.running += 1
        self._sent += 1
        return self._sent

    def cancel(self) -> None:
        """Count a request out of which nothing is known."""
        self.running -= 1

    def end(self, ticket: int, fault: Fault | None, now: float) -> None:
        """Count a request out, and learn from how it went."""
        self.running -= 1
        if fault and fault.slow and ticket > self._sent_when_halved:
            # What was sent before the limit was halved says nothing about the new one.
            self.limit, self._good = max(1, self.limit // 2), 0
            self._sent_when_halved = self._sent
        if fault and fault.wait:
            if fault.wait >= LOUD_WAIT and self._until <= now:
                log.warning("%s wants %.0f s before the next request: %s", self.url, fault.wait, fault.reason)
            self._until, self.reason = max(self._until, now + fault.wait), fault.reason
        if fault and fault.down:
            self._failures += 1
            # What was sent before the pause says nothing about the time after it.
            if self._failures >= FAILURES and ticket > self._sent_when_paused and not fault.wait:
                self.leave_out(fault.reason, now)
            return
        self._failures = 0
        if self.paused:
            log.info("%s answers again", self.url)
            self.paused, self._pause, self._until = False, 0.0, now + (fault.wait if fault else 0.0)
        if fault is None:
            self._good += 1
            if self._good >= self.limit:
                self.limit, self._good = min(MOST_IN_FLIGHT, self.limit + 1), 0

    def leave_out(self, reason: str, now: float) -> None:
        """Begin a pause."""
        self.paused = True
        self._pause = min(LONGEST_PAUSE, 2 * self._pause or PAUSE)
        self._until = max(self._until, now + self._pause)
        self._sent_when_paused = self._sent
        self._failures = max(self._failures, FAILURES)
        self.reason = reason
        log.warning("%s is left out for %.0f s: %s", self.url, self._pause, reason)


class Rate:
    """Requests evenly spaced, at most `per_minute` of them; 0 is no limit."""

    def __init__(self, per_minute: int) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    def wait(self, now: float) -> float:
        """Seconds until the next request may start."""
        return max(0.0, self._next - now)

    def take(self, now: float) -> None:
        """Count a request that starts now."""
        self._next = max(now, self._next) + self._interval


def retry_after(value: str, most: float = LONGEST_RETRY_AFTER) -> float:
    """Seconds that a `Retry-After` header asks for, as a number or a date, at most `most`; 0 without one."""
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value).astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return min(most, seconds) if seconds > 0 else 0.0
