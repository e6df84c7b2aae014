"""What runs inside a worker: torch, the hosted modules and their derivatives."""

from pullback_server.engine.call import WritesInputs
from pullback_server.engine.core import Engine
from pullback_server.engine.results import EngineResult

__all__ = ["Engine", "EngineResult", "WritesInputs"]
