"""Where workers live: separate processes that hold torch, the models and the devices.

`scheduling` speaks to what `seam` describes; `LocalFleet` is what stands behind it on one machine. Nothing here
imports torch or grpc.
"""

from pullback_server.fleet.local import LocalFleet
from pullback_server.fleet.seam import Buffer, Fleet, Reply, StartError, Worker, WorkerLost, WorkerState

__all__ = [
    "Buffer",
    "Fleet",
    "LocalFleet",
    "Reply",
    "StartError",
    "Worker",
    "WorkerLost",
    "WorkerState",
]
