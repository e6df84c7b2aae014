"""TLS of the server: certificates that are renewed under it, for gRPC and for HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

logger = logging.getLogger(__name__)

#: Seconds between two looks at the files, and before the end of a certificate that are worth a warning, once a day.
_PAUSE, _SOON, _DAY = 1.0, 7 * 86400.0, 86400.0
_LARGEST = 4 << 20


class CertificateError(Exception):
    """Certificate, key or client CA cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class TlsFiles:
    """Paths of PEM files.

    client_ca: certificates that vouch for clients, each of whom then needs one; None: none does.
    """

    cert: str
    key: str
    client_ca: str | None = None


@dataclass(frozen=True)
class _Material:
    """The files' contents, which go together. ends: the first end of the certificates sent, in s since 1970."""

    cert: bytes
    key: bytes
    client_ca: bytes | None
    ends: float


class Certificates:
    """What the files hold, as of when they last went together. Any thread may ask.

    Raises CertificateError from the constructor.
    """

    def __init__(self, files: TlsFiles, expiry: Callable[[float], None]) -> None:
        """expiry: told when the certificate that is used ends."""
        self._files = files
        self._expiry = expiry
        self._lock = threading.Lock()
        self._context: tuple[_Material, ssl.SSLContext] | None = None
        self._seen = _read(files)
        self._material = _checked(files, *self._seen)
        self._told = ""
        self._warned = -math.inf
        expiry(self._material.ends)
        self._warn()

    @property
    def client_certificates(self) -> bool:
        """Whether clients need one."""
        return self._files.client_ca is not None

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC: each new connection gets the certificate of the time; those that are open keep theirs."""
        latest = self._material

        def fetch() -> Any:
            # Called for every connection, by a thread of gRPC's.
            nonlocal latest
            if self._material is latest:
                return None
            latest = self._material
            return _configuration(latest)

        return grpc.dynamic_ssl_server_credentials(_configuration(latest), fetch, self.client_certificates)

    def context(self) -> ssl.SSLContext:
        """For HTTP: whoever wraps a socket with it gets what is current at that moment."""
        return _Current(self)

    def current(self) -> ssl.SSLContext:
        """A context of what is current, made when that has changed."""
        with self._lock:
            material = self._material
            if self._context is None or self._context[0] is not material:
                self._context = material, _context(material)
            return self._context[1]

    async def follow(self) -> None:
        """Goes by the files as they are. Until cancelled."""
        while True:
            await asyncio.sleep(_PAUSE)
            try:
                await asyncio.to_thread(self._refresh)
                self._warn()
            except CertificateError as error:
                if str(error) != self._told:
                    self._told = str(error)
                    logger.error("TLS goes on with the certificate that it has: %s", error)
            except Exception:
                logger.exception("TLS: looking for another certificate failed; trying again")

    def _refresh(self) -> None:
        """Raises CertificateError, also where a rotation is under way and the files do not go together yet."""
        found = _read(self._files)
        if found == self._seen:
            return
        material = _checked(self._files, *found)
        # Only what was good counts as seen: the rest is looked at again, and told once.
        self._seen, self._material, self._told = found, material, ""
        self._expiry(material.ends)
        self._warned = -math.inf
        logger.info("TLS: new connections get the certificate that ends at %s", _date(material.ends))

    def _warn(self) -> None:
        left = self._material.ends - time.time()
        if left < _SOON and time.monotonic() - self._warned > _DAY:
            self._warned = time.monotonic()
            logger.warning("TLS: certificate %s ends at %s", self._files.cert, _date(self._material.ends))


class _Current(ssl.SSLContext):
    """Stands for the current context of some Certificates."""

    _certificates: Certificates

    def __new__(cls, certificates: Certificates) -> _Current:
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made._certificates = certificates
        return made

    def __init__(self, certificates: Certificates) -> None:
        pass

    def wrap_socket(self, *args: Any, **settings: Any) -> ssl.SSLSocket:
        return self._certificates.current().wrap_socket(*args, **settings)


def _configuration(material: _Material) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.client_ca)


def _context(material: _Material) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # OpenSSL takes them from files alone. Written for a moment, readable by this user alone.
    with tempfile.NamedTemporaryFile(prefix="pullback-tls-") as file:
        file.write(material.key.strip() + b"\n" + material.cert)
        file.flush()
        context.load_cert_chain(file.name)
    if material.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=material.client_ca.decode("ascii"))
    return context


def _read(files: TlsFiles) -> tuple[bytes, bytes, bytes | None]:
    """Raises CertificateError."""
    return (
        _contents("--tls-cert", files.cert),
        _contents("--tls-key", files.key),
        None if files.client_ca is None else _contents("--tls-client-ca", files.client_ca),
    )


def _contents(option: str, path: str) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(_LARGEST + 1)
    except OSError as error:
        raise CertificateError(f"{option} {path}: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise CertificateError(f"{option} {path}: it has more than {_LARGEST} bytes")
    return data


def _checked(files: TlsFiles, cert: bytes, key: bytes, client_ca: bytes | None) -> _Material:
    """Raises CertificateError where the three are not what they should be, or do not go together."""
    chain = _certificates("--tls-cert", files.cert, cert)
    try:
        private = serialization.load_pem_private_key(key, None)
    except TypeError:
        raise CertificateError(f"--tls-key {files.key}: it needs a password, which nobody can give here") from None
    except (ValueError, UnsupportedAlgorithm):
        raise CertificateError(f"--tls-key {files.key}: expected a private key in PEM") from None
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise CertificateError(f"--tls-key {files.key} is not the key of the certificate in {files.cert}")
    now = time.time()
    ends = min(one.not_valid_after_utc.timestamp() for one in chain)
    if ends <= now:
        raise CertificateError(f"--tls-cert {files.cert}: the certificate has expired, at {_date(ends)}")
    begins = max(one.not_valid_before_utc.timestamp() for one in chain)
    if begins > now:
        raise CertificateError(f"--tls-cert {files.cert}: the certificate is not valid before {_date(begins)}")
    if client_ca is not None:
        _certificates("--tls-client-ca", str(files.client_ca), client_ca)
    return _Material(cert, key, client_ca, ends)


def _certificates(option: str, path: str, data: bytes) -> list[x509.Certificate]:
    try:
        # Roots are not always by the book, which is for TLS to judge.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise CertificateError(f"{option} {path}: expected certificates in PEM") from None


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
