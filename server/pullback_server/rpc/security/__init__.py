"""Who is calling, and what that one may do: principals, tokens, certificates, quotas, and the gate before all calls."""

from pullback_server.rpc.security.access import Access
from pullback_server.rpc.security.callers import Caller, caller, sees
from pullback_server.rpc.security.gate import Gate
from pullback_server.rpc.security.principals import PrincipalsError, new_key
from pullback_server.rpc.security.quotas import SessionUse

__all__ = ["Access", "Caller", "Gate", "PrincipalsError", "SessionUse", "caller", "new_key", "sees"]
