"""gRPC: decode, check, hand on, encode. Knows no torch."""

from pullback_server.rpc.probes import Probes
from pullback_server.rpc.security import Access, PrincipalsError, new_key
from pullback_server.rpc.server import Front, FrontOptions
from pullback_server.rpc.tls import CertificateError, Certificates, TlsFiles

__all__ = [
    "Access",
    "CertificateError",
    "Certificates",
    "Front",
    "FrontOptions",
    "PrincipalsError",
    "Probes",
    "TlsFiles",
    "new_key",
]
