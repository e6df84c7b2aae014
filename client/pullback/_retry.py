"""When a failed call is made again, and how long to wait before."""

from __future__ import annotations

import random
from dataclasses import dataclass

from pullback import errors

#: Not the module's shared generator: a library must not disturb a seeded program, and forked children must not agree.
_random = random.SystemRandom()


@dataclass(frozen=True)
class RetryPolicy:
    """How calls are retried. Only pure calls are, and only after failures that another attempt may cure.

    Retried are: a server that cannot be reached or goes away, a connection that broke, and whatever the server itself
    asks to retry (loading, overloaded). Never retried: a call that killed workers, one that ran out of time or memory,
    one that is wrong. All attempts together stay within the call's timeout.

    attempts: how often a call is made at most; 1: never retried.
    initial_backoff: seconds before the second attempt at most; doubles with each attempt.
    max_backoff: seconds that no pause of the client's own choosing exceeds.
    jitter: the random share of each pause, between 0 and 1; 1: anything from nothing to the whole pause.

    Raises ValueError for values that cannot be.
    """

    attempts: int = 5
    initial_backoff: float = 0.1
    max_backoff: float = 5.0
    jitter: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.attempts, bool) or not isinstance(self.attempts, int) or self.attempts < 1:
            raise ValueError(f"attempts is {self.attempts!r}, expected an int of 1 or more")
        if not 0 <= self.initial_backoff < float("inf") or not 0 <= self.max_backoff < float("inf"):
            raise ValueError(
                f"initial_backoff is {self.initial_backoff} and max_backoff {self.max_backoff}, expected seconds"
            )
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter is {self.jitter}, expected a number from 0 to 1")

    def pause(self, error: errors.PullbackError, attempt: int) -> float | None:
        """Seconds to wait after attempt number `attempt` (from 1) failed; None: do not try again."""
        if attempt >= self.attempts or not _is_curable(error):
            return None
        # The exponent is bounded so that a long series cannot overflow.
        whole = min(self.initial_backoff * 2.0 ** min(attempt - 1, 60), self.max_backoff)
        backoff = whole * (1 - self.jitter * _random.random())
        # The server's wish is a least time; the jitter on top keeps its callers from coming back in step.
        return backoff if error.retry_after is None else error.retry_after + backoff


def _is_curable(error: errors.PullbackError) -> bool:
    if isinstance(error, errors.WorkerLost | errors.DeadlineExceeded):
        # The job is what killed the worker, as like as not; and time that has run out does not come back.
        return False
    if error.retry_after is not None:
        return True
    if isinstance(error, errors.NotReady):
        return True
    if isinstance(error, errors.ClientClosed):
        return False
    # Without a reason it is the transport that speaks. CANCELLED is what gRPC's server says of calls that come in the
    # moment in which it closes.
    return isinstance(error, errors.Unavailable | errors.Cancelled) and not error.reason
