"""TLS of the server: certificates that are renewed under it, for gRPC and for HTTP."""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from collections.abc import Callable
from typing import Any

import grpc

from pullback_server.rpc.tls_files import CertificateError, Material, TlsFiles, checked, date, read

logger = logging.getLogger(__name__)

#: Seconds between two looks at the files, and before the end of a certificate that are worth a warning, once a day.
_PAUSE, _SOON, _DAY = 1.0, 7 * 86400.0, 86400.0


class Certificates:
    """What the files hold, as of when they last went together. Any thread may ask.

    Raises CertificateError from the constructor.
    """

    def __init__(self, files: TlsFiles, expiry: Callable[[float], None]) -> None:
        """expiry: told when the certificate that is used ends."""
        self._files = files
        self._expiry = expiry
        self._seen = read(files)
        self._material = checked(files, *self._seen)
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
        """The context of what is current."""
        return self._material.context

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
        found = read(self._files)
        if found == self._seen:
            self._told = ""
            return
        material = checked(self._files, *found)
        # Only what was good counts as seen: the rest is looked at again, and told once.
        self._seen, self._material, self._told = found, material, ""
        self._expiry(material.ends)
        self._warned = -math.inf
        logger.info("TLS: new connections get the certificate that ends at %s", date(material.ends))

    def _warn(self) -> None:
        left = self._material.ends - time.time()
        if left < _SOON and time.monotonic() - self._warned > _DAY:
            self._warned = time.monotonic()
            logger.warning("TLS: certificate %s ends at %s", self._files.cert, date(self._material.ends))


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


def _configuration(material: Material) -> Any:
    return grpc.ssl_server_certificate_configuration([(material.key, material.cert)], material.client_ca)
