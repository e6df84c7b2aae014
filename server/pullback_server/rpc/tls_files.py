"""The files of TLS: what is in them, and whether it can be used and goes together."""

from __future__ import annotations

import os
import ssl
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from pullback_server.rpc.small_files import contents

#: Keys that gRPC offers and takes, everywhere: with any other no client would get in, and nothing would say why.
_CURVES = ("secp256r1", "secp384r1")
_SMALLEST_RSA = 2048


class CertificateError(Exception):
    """Certificate, key or client CA cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files.

    client_ca: certificates that vouch for clients, each of whom then needs one for gRPC, and may have one for HTTP,
    where probes and browsers have none; None: they have none.
    """

    cert: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True)
class Material:
    """The files' contents, which go together. ends: the first end of the certificates sent, in s since 1970.

    context: made of them, for HTTP.
    """

    cert: bytes
    key: bytes
    client_ca: bytes | None
    ends: float
    context: ssl.SSLContext


def _context(cert: bytes, key: bytes, client_ca: list[x509.Certificate]) -> ssl.SSLContext:
    """Raises ssl.SSLError, OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _as_file(key.strip() + b"\n" + cert) as path:
        context.load_cert_chain(path)
    if client_ca:
        context.verify_mode = ssl.CERT_OPTIONAL
        # Not the file's text, which OpenSSL would have in ASCII, remarks and all.
        form = serialization.Encoding.DER
        context.load_verify_locations(cadata=b"".join(one.public_bytes(form) for one in client_ca))
    return context


@contextmanager
def _as_file(data: bytes) -> Iterator[str]:
    """A path to read secrets from, for OpenSSL takes them from files alone. In memory, where the system has such."""
    if hasattr(os, "memfd_create"):
        with os.fdopen(os.memfd_create("pullback-tls", os.MFD_CLOEXEC), "wb") as file:
            file.write(data)
            file.flush()
            yield f"/proc/self/fd/{file.fileno()}"
    else:
        with tempfile.NamedTemporaryFile(prefix="pullback-tls-") as named:
            named.write(data)
            named.flush()
            yield named.name


def read(files: TlsFiles) -> tuple[bytes, bytes, bytes | None]:
    """Raises CertificateError."""
    return (
        contents(files.cert, "--tls-cert", CertificateError),
        contents(files.key, "--tls-key", CertificateError),
        None if files.client_ca is None else contents(files.client_ca, "--tls-client-ca", CertificateError),
    )


def checked(files: TlsFiles, cert: bytes, key: bytes, client_ca: bytes | None) -> Material:
    """Raises CertificateError where the three are not what they should be, or do not go together."""
    chain = _certificates("--tls-cert", files.cert, cert)
    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise CertificateError(f"--tls-key {files.key}: it needs a password, which nobody can give here") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"--tls-key {files.key}: expected a private key in PEM") from None
    if not _usable(private):
        raise CertificateError(
            f"--tls-key {files.key}: expected an RSA key of {_SMALLEST_RSA} bits or more, or one on P-256 or P-384, "
            "which are what gRPC's clients take"
        )
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise CertificateError(f"--tls-key {files.key} is not the key of the certificate in {files.cert}")
    now = time.time()
    ends = min(one.not_valid_after_utc.timestamp() for one in chain)
    if ends <= now:
        raise CertificateError(f"--tls-cert {files.cert}: the certificate has expired, at {date(ends)}")
    begins = max(one.not_valid_before_utc.timestamp() for one in chain)
    if begins > now:
        raise CertificateError(f"--tls-cert {files.cert}: the certificate is not valid before {date(begins)}")
    vouching = [] if client_ca is None else _certificates("--tls-client-ca", str(files.client_ca), client_ca)
    try:
        context = _context(cert, key, vouching)
    except (ssl.SSLError, OSError) as error:
        raise CertificateError(f"--tls-cert {files.cert}: {error}") from None
    return Material(cert, key, client_ca, ends, context)


def _usable(key: Any) -> bool:
    if isinstance(key, rsa.RSAPrivateKey):
        return key.key_size >= _SMALLEST_RSA
    return isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in _CURVES


def _certificates(option: str, path: str, data: bytes) -> list[x509.Certificate]:
    try:
        # Roots are not always by the book, which is for TLS to judge.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise CertificateError(f"{option} {path}: expected certificates in PEM") from None


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
