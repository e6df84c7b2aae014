"""What a client certificate says of whom it belongs to."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cryptography import x509
from cryptography.x509.oid import NameOID

from pullback_server.faults import Fault
from pullback_wire import Reason


class Peer(NamedTuple):
    """names: host names and URIs, or the common name where there are neither. begins, expires: since 1970, in s."""

    names: tuple[str, ...]
    begins: float
    expires: float


@lru_cache(1024)
def peer_of(certificate: bytes) -> Peer:
    """Of a certificate that TLS has verified, as PEM or DER. Raises Fault (UNAUTHENTICATED) where it makes no sense."""
    try:
        pem = certificate.lstrip().startswith(b"-----")
        found = x509.load_pem_x509_certificate(certificate) if pem else x509.load_der_x509_certificate(certificate)
        return Peer(_names(found), found.not_valid_before_utc.timestamp(), found.not_valid_after_utc.timestamp())
    # TLS takes certificates that cryptography does not.
    except ValueError:
        raise Fault(Reason.UNAUTHENTICATED, "the client certificate cannot be read") from None


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        alternative = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        alternative = None
    if alternative is not None:
        # What calls itself a host and has a colon in it would pass for a URI.
        hosts = [name for name in alternative.get_values_for_type(x509.DNSName) if ":" not in name]
        uris = [name for name in alternative.get_values_for_type(x509.UniformResourceIdentifier) if "://" in name]
        if hosts or uris:
            return (*hosts, *uris)
    common = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return tuple(str(one.value) for one in common if "://" not in str(one.value)) if len(common) == 1 else ()
