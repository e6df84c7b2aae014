"""What the service tells of itself: every metric declared once, and the HTTP endpoint that serves them."""

from pullback_server.telemetry.endpoint import Endpoint, Vitals
from pullback_server.telemetry.metrics import Metrics

__all__ = ["Endpoint", "Metrics", "Vitals"]
