"""Where a job waits for a worker. Knows neither torch nor grpc."""

from pullback_server.scheduling.pinned import OnItsWay, Pinned
from pullback_server.scheduling.scheduler import Limits, Scheduled, Scheduler

__all__ = ["Limits", "OnItsWay", "Pinned", "Scheduled", "Scheduler"]
