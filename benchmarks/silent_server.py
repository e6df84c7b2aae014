"""`pullback-server` whose metrics count nothing: what counting costs is the difference to one that does."""

import sys
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

from pullback_server.cli import main
from pullback_server.telemetry import Metrics


def nothing(*_: Any, **__: Any) -> None:
    pass


for kind in (Counter, Gauge, Histogram):
    for name in ("inc", "dec", "set", "observe"):
        if hasattr(kind, name):
            setattr(kind, name, nothing)
for name in ("call", "stages", "session_op", "health"):
    setattr(Metrics, name, nothing)

if __name__ == "__main__":
    sys.exit(main())
