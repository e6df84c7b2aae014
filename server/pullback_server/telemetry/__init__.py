"""What the service tells of itself: every metric declared once, and the HTTP endpoint that serves them."""

from pullback_server.telemetry.declarations import Declared, declared
from pullback_server.telemetry.devices import Devices
from pullback_server.telemetry.endpoint import Endpoint
from pullback_server.telemetry.metrics import Metrics
from pullback_server.telemetry.page_status import Status
from pullback_server.telemetry.vitals import Vitals

__all__ = ["Declared", "Devices", "Endpoint", "Metrics", "Status", "Vitals", "declared"]
