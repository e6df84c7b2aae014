"""gRPC: decode, check, hand on, encode. Knows no torch."""

from pullback_server.rpc.server import Front, FrontOptions

__all__ = ["Front", "FrontOptions"]
