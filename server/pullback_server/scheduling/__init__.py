"""Where a job waits for a worker. Knows neither torch nor grpc."""

from pullback_server.scheduling.admission import Limits
from pullback_server.scheduling.pinned import OnItsWay, Pinned
from pullback_server.scheduling.policy import Policy, Tally
from pullback_server.scheduling.queue import NOBODY, Origin
from pullback_server.scheduling.scheduler import Scheduled, Scheduler

__all__ = ["NOBODY", "Limits", "OnItsWay", "Origin", "Pinned", "Policy", "Scheduled", "Scheduler", "Tally"]
