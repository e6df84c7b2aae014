"""Where reflection looks for names: everybody's descriptors, then those of the Open Inference Protocol."""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pool

from pullback_wire.inference import open_inference_pb2 as pb


class Descriptors:
    """What `grpc_reflection` asks of a pool. A name of ours means ours, whatever else this process has loaded."""

    def __init__(self) -> None:
        self._pools = (pb.DESCRIPTOR.pool, descriptor_pool.Default())

    def __getattr__(self, question: str) -> Any:
        def ask(*about: Any) -> Any:
            error: Exception = KeyError(question)
            for pool in self._pools:
                try:
                    return getattr(pool, question)(*about)
                except (KeyError, TypeError) as wrong:
                    error = wrong
            raise error

        return ask
