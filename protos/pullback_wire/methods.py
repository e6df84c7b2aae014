"""The unary RPCs by name. Calls travel as raw bytes through `framing`, so there are no generated stubs."""

from __future__ import annotations

from dataclasses import dataclass

from google.protobuf.message import Message

from pullback_wire.v1 import gradient_service_pb2 as gradient
from pullback_wire.v1 import model_service_pb2 as model
from pullback_wire.v1 import session_service_pb2 as session


@dataclass(frozen=True)
class Method:
    """One unary RPC."""

    service: str
    name: str
    request: type[Message]
    response: type[Message]

    @property
    def path(self) -> str:
        """What gRPC calls it, e.g. "/pullback.v1.GradientService/Evaluate"."""
        return f"/{self.service}/{self.name}"


def unary_methods(file: object, service: str) -> dict[str, Method]:
    """A service's unary methods by name. file: its generated module."""
    descriptor = file.DESCRIPTOR.services_by_name[service]  # type: ignore[attr-defined]
    return {
        method.name: Method(
            descriptor.full_name,
            method.name,
            getattr(file, method.input_type.name),
            getattr(file, method.output_type.name),
        )
        for method in descriptor.methods
        if not method.client_streaming and not method.server_streaming
    }


#: GradientService's methods by name.
GRADIENT_METHODS: dict[str, Method] = unary_methods(gradient, "GradientService")
#: ModelService's unary methods by name.
MODEL_METHODS: dict[str, Method] = unary_methods(model, "ModelService")
#: SessionService's full name; its one method is a stream, "Session".
SESSION_SERVICE: str = session.DESCRIPTOR.services_by_name["SessionService"].full_name

#: Metadata key: whom a call is counted for; without it, its connection.
CALLER_KEY = "pullback-caller"
#: Metadata key: "high" (before the same caller's other calls, and with a larger share) or "normal".
PRIORITY_KEY = "pullback-priority"
#: Metadata key: what the logs of server and client call a request; the server makes one where none comes.
REQUEST_ID_KEY = "pullback-request-id"
#: Metadata key: "1" asks for where the time went; so is the trailer called that tells it, as JSON.
TIMINGS_KEY = "pullback-timings"
