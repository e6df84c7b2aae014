"""`Access`: the principals of one server, by a file that may change."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pullback_server.faults import Fault
from pullback_server.rpc.security.callers import Caller, Credentials, Identity
from pullback_server.rpc.security.peers import peer_of
from pullback_server.rpc.security.principals import (
    ANONYMOUS,
    Book,
    Principal,
    PrincipalsError,
    Quota,
    Right,
    read_book,
)
from pullback_server.rpc.security.quotas import Usage
from pullback_server.rpc.security.tokens import Tokens
from pullback_server.rpc.small_files import contents
from pullback_server.telemetry import Metrics
from pullback_wire import Reason

logger = logging.getLogger(__name__)

_BEARER = "bearer "
#: Characters of a token that is looked at.
_LONGEST = 8192
#: Seconds between two looks at the file, and for which it must have been the same when it has changed.
_PAUSE, _SETTLING = 1.0, 0.3
#: Sessions looked after before the event loop gets a turn.
_AT_ONCE = 50

#: Who everybody is where there is no file.
_EVERYBODY = Principal(ANONYMOUS, ("call", "session", "metrics"), ("*",), Quota())


class _Source:
    """The file and the key set that it names, as they were last seen. Reads them, so not on the event loop.

    Both are read whole each time, for they are small, and then it does not matter in which way they are replaced.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._data: bytes | None = None
        self._keys: bytes | None = None
        #: None while the file as it was last seen is broken.
        self._book: Book | None = None

    def read(self) -> tuple[Book, Tokens | None] | None:
        """What they say; None: they are as they were when they were last read, be it with success or not.

        Raises PrincipalsError.
        """
        data = contents(self._path, "principals", PrincipalsError)
        fresh = data != self._data
        if fresh and self._data is not None:
            # Who writes into the file is not done at once, and the first half of it may make sense.
            time.sleep(_SETTLING)
            if contents(self._path, "principals", PrincipalsError) != data:
                return None
        if fresh:
            self._data, self._keys, self._book = data, None, None
            self._book = read_book(self._path, data)
        book = self._book
        if book is None or book.jwt is None:
            return (book, None) if fresh and book is not None else None
        path = str(Path(self._path).parent / book.jwt.jwks)
        keys = contents(path, "key set", PrincipalsError)
        if keys == self._keys:
            return None
        self._keys = keys
        return book, Tokens(book.jwt, path, keys)


class Access:
    """Tells whose credentials are whose, keeps count of what each principal uses, and follows its file.

    `identify` and `admit_metrics` may be called by any thread, all else on the event loop.

    path: of the file; None: there are no principals, everybody may call and nobody may administer.
    by_certificate: TLS asks those who want the metrics for a certificate. Where there are no principals, nobody else
    sees them then.
    Raises PrincipalsError.
    """

    def __init__(self, path: str | None, metrics: Metrics, by_certificate: bool = False) -> None:
        self._metrics = metrics
        self._by_certificate = by_certificate
        self._source = None if path is None else _Source(path)
        self.closed = self._source is not None
        self.generation = 0
        found = self._source.read() if self._source is not None else None
        #: Replaced as one, so that no thread sees half of a change.
        self._book: tuple[Book, Tokens | None] | None = found
        self._usage: dict[str, Usage] = {}
        self._kept: dict[Caller, tuple[Right, Callable[[Fault], None]]] = {}
        self._told = ""

    def identify(self, credentials: Credentials) -> Identity:
        """Raises Fault (UNAUTHENTICATED)."""
        if self._book is None:
            return Identity(_EVERYBODY, math.inf)
        book, tokens = self._book
        if credentials.authorization:
            # A token that is no good must not make of its bearer somebody else, not even nobody.
            return _by_token(book, tokens, credentials.authorization)
        if credentials.certificate is not None:
            peer = peer_of(credentials.certificate)
            if not peer.begins <= time.time() < peer.expires:
                raise Fault(Reason.UNAUTHENTICATED, "the client certificate has expired, or is not valid yet")
            principal = book.of_certificate(peer.names)
            if principal is not None:
                return Identity(principal, peer.expires)
        if book.anonymous is not None:
            return Identity(book.anonymous, math.inf)
        if credentials.certificate is not None:
            raise Fault(Reason.UNAUTHENTICATED, "the client certificate is no principal's, and there is no token")
        raise Fault(
            Reason.UNAUTHENTICATED,
            "this server answers only callers whom it knows: metadata authorization: Bearer TOKEN, or a client "
            "certificate",
        )

    def admit(self, credentials: Credentials) -> Caller:
        """Raises Fault (UNAUTHENTICATED)."""
        try:
            identity = self.identify(credentials)
        except Fault as fault:
            raise self.refused(fault) from None
        principal = identity.principal
        usage = self._usage.get(principal.name)
        if usage is None:
            usage = self._usage[principal.name] = Usage(principal.name, principal.quota, self._quota_spent)
        elif usage.quota is not principal.quota:
            usage.set(principal.quota)
        return Caller(self, credentials, identity, usage)

    def admit_metrics(self, authorization: str | None, certificate: bytes | None = None) -> None:
        """Lets those pass who may see the metrics and the page. For any thread; telemetry's `Admit`.

        authorization: the header of that name; None: there was none. certificate: the client's, DER, where TLS has
        verified one.

        Raises Fault: UNAUTHENTICATED (HTTP's 401) or PERMISSION_DENIED (403).
        """
        headers = () if authorization is None else (authorization,)
        if self._by_certificate and not self.closed and certificate is None:
            raise self.refused(Fault(Reason.UNAUTHENTICATED, "this needs a client certificate"))
        try:
            principal = self.identify(Credentials(headers, certificate)).principal
        except Fault as fault:
            raise self.refused(fault) from None
        if "metrics" in principal.rights:
            return
        if principal.name == ANONYMOUS:
            raise self.refused(Fault(Reason.UNAUTHENTICATED, "this needs a token with the right 'metrics'"))
        raise self.refused(Fault(Reason.PERMISSION_DENIED, f"principal {principal.name!r} has not the right 'metrics'"))

    def refused(self, fault: Fault) -> Fault:
        """Counts what a call was refused with because of who makes it."""
        self._metrics.auth_failures.labels(fault.reason.value).inc()
        return fault

    def _quota_spent(self, quota: str) -> None:
        self._metrics.quota_refusals.labels(quota).inc()

    @contextmanager
    def keep(self, caller: Caller, right: Right, end: Callable[[Fault], None]) -> Iterator[None]:
        """Calls `end` once when a caller loses a right, or a model that it uses, while it is inside."""
        self._kept[caller] = right, end
        try:
            yield
        finally:
            self._kept.pop(caller, None)

    async def follow(self) -> None:
        """Goes by the file as it is, and looks after those who are inside. Until cancelled."""
        while self._source is not None:
            await asyncio.sleep(_PAUSE)
            try:
                await self._refresh(self._source)
                await self._look_after()
            except Exception:
                # Whatever it is, nobody else would notice that the file is not followed any more.
                logger.exception("principals: looking after them failed; trying again")

    async def _refresh(self, source: _Source) -> None:
        try:
            found = await asyncio.to_thread(source.read)
        except PrincipalsError as error:
            if str(error) != self._told:
                self._told = str(error)
                logger.error("the principals stay as they were, for the file is broken: %s", error)
            return
        self._told = ""
        if found is None:
            return
        self._book = found
        self.generation += 1
        book = found[0]
        for name in [name for name, usage in self._usage.items() if name not in book.names and usage.idle]:
            del self._usage[name]
        logger.info("principals read anew: %d of them", len(book.names) - 1)

    async def _look_after(self) -> None:
        looked_at = 0
        for caller, (right, end) in list(self._kept.items()):
            if not caller.stale:
                continue
            try:
                caller.recheck(right)
                caller.usage.set(caller.renew().quota)
            except Fault as fault:
                self._kept.pop(caller, None)
                end(fault)
            looked_at += 1
            if looked_at % _AT_ONCE == 0:
                await asyncio.sleep(0)


def _by_token(book: Book, tokens: Tokens | None, headers: tuple[str, ...]) -> Identity:
    """Raises Fault (UNAUTHENTICATED)."""
    if len(headers) > 1:
        raise Fault(Reason.UNAUTHENTICATED, f"there are {len(headers)} authorization headers, expected one")
    header = headers[0]
    if not (isinstance(header, str) and header[: len(_BEARER)].lower() == _BEARER and header.isascii()):
        raise Fault(Reason.UNAUTHENTICATED, "authorization is not of the form 'Bearer TOKEN'")
    token = header[len(_BEARER) :].strip(" ")
    if not token or len(token) > _LONGEST:
        raise Fault(Reason.UNAUTHENTICATED, f"the token has {len(token)} characters, expected 1 to {_LONGEST}")
    if tokens is not None and token.count(".") == 2:
        subject, expires = tokens.verify(token)
        principal = book.of_subject(subject)
        if principal is None:
            raise Fault(Reason.UNAUTHENTICATED, "the token is good, but its subject is no principal's")
        return Identity(principal, expires)
    # Found by its hash: from the time that this takes nothing follows about a token.
    digest = hashlib.sha256(token.encode()).hexdigest()
    principal = book.by_digest.get(digest)
    if principal is None:
        raise Fault(Reason.UNAUTHENTICATED, "this server does not know the token")
    return Identity(principal, math.inf)
