"""gRPC: decode, check, hand on, encode. Knows no torch."""

from pullback_server.rpc.access import Access, KeyFileError, new_key, read_keys
from pullback_server.rpc.server import Front, FrontOptions

__all__ = ["Access", "Front", "FrontOptions", "KeyFileError", "new_key", "read_keys"]
