"""gRPC: decode, check, hand on, encode. Knows no torch."""

from pullback_server.rpc.probes import Probes, vacant
from pullback_server.rpc.security import Access, PrincipalsError, new_key
from pullback_server.rpc.server import Front, FrontOptions
from pullback_server.rpc.tls import Certificates
from pullback_server.rpc.tls_files import CertificateError, TlsFiles

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
    "vacant",
]
