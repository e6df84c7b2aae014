"""Who makes the call that is being answered."""

from __future__ import annotations

import time
from contextvars import ContextVar
from typing import NamedTuple, Protocol

from pullback_server.faults import Fault
from pullback_server.rpc.security.principals import ANONYMOUS, Principal, Right
from pullback_server.rpc.security.quotas import Usage
from pullback_wire import Reason

#: Bytes of a model's name that a refusal repeats.
_SHOWN = 128


class Credentials(NamedTuple):
    """What came along to tell who is calling.

    authorization: the values of that header, all of them. certificate: the client's, PEM or DER.
    """

    authorization: tuple[str, ...] = ()
    certificate: bytes | None = None


class Identity(NamedTuple):
    """Whose credentials these are, and until when (on time.time's clock)."""

    principal: Principal
    expires: float


class Authority(Protocol):
    """Who knows principals; see Access.

    closed: there is a principals file. generation: another number whenever another file is gone by.
    """

    closed: bool
    generation: int

    def identify(self, credentials: Credentials) -> Identity: ...
    def refused(self, fault: Fault) -> Fault: ...


class Caller:
    """A caller who was let in, for as long as a call or a session lasts. Every question is answered by today's file.

    Each method that raises does so with UNAUTHENTICATED, too, where the credentials have since expired, were taken off
    the file, or are another principal's by now.
    """

    __slots__ = ("_authority", "_credentials", "_expires", "_generation", "_principal", "models", "usage")

    def __init__(self, authority: Authority, credentials: Credentials, identity: Identity, usage: Usage) -> None:
        self._authority = authority
        self._credentials = credentials
        self._principal, self._expires = identity
        self._generation = authority.generation
        self.usage = usage
        #: Models without which what it does, a session say, cannot go on. Of models that there are: a caller could
        #: name others for ever.
        self.models: set[str] = set()

    @property
    def name(self) -> str:
        """The principal's name."""
        return self._principal.name

    @property
    def stale(self) -> bool:
        """Whether the answer to who this is may have changed."""
        return self._generation != self._authority.generation or time.time() >= self._expires

    def renew(self) -> Principal:
        """Who this is now. Raises Fault."""
        if self.stale:
            generation = self._authority.generation
            try:
                principal, expires = self._authority.identify(self._credentials)
            except Fault as fault:
                raise self._authority.refused(fault) from None
            if principal.name != self._principal.name:
                raise self._refused(Reason.UNAUTHENTICATED, "the credentials are another principal's by now")
            self._principal, self._expires, self._generation = principal, expires, generation
        return self._principal

    def need(self, *rights: Right) -> None:
        """Raises Fault where it has none of these rights: PERMISSION_DENIED, ADMIN_DISABLED, UNAUTHENTICATED."""
        principal = self.renew()
        if not principal.rights.isdisjoint(rights):
            return
        if not self._authority.closed and not principal.rights.union(("call", "session", "metrics")) & set(rights):
            raise self._refused(
                Reason.ADMIN_DISABLED,
                "this is an administrative call, and this server offers none (it was started without --principals)",
            )
        wanted = " or ".join(repr(right) for right in rights)
        if principal.name == ANONYMOUS:
            raise self._refused(
                Reason.UNAUTHENTICATED,
                f"this call needs the right {wanted}, which callers have only with credentials: metadata "
                "authorization: Bearer TOKEN, or a client certificate",
            )
        raise self._refused(Reason.PERMISSION_DENIED, f"principal {principal.name!r} has not the right {wanted}")

    def need_model(self, model: str, field: str = "") -> None:
        """Raises Fault (PERMISSION_DENIED) for a model that is not this caller's, be there one of that name or not."""
        if not self.renew().sees(model):
            shown = model if len(model) <= _SHOWN else model[:_SHOWN] + "..."
            raise self._refused(
                Reason.PERMISSION_DENIED, f"principal {self.name!r} has no right to a model called {shown!r}", field
            )

    def _refused(self, reason: Reason, message: str, field: str = "") -> Fault:
        return self._authority.refused(Fault(reason, message, field))

    def recheck(self, right: Right) -> None:
        """Raises Fault where it would not be let in any more, or not to a model that it uses."""
        self.need(right)
        for model in self.models:
            self.need_model(model)

    def sees(self, model: str) -> bool:
        """Whether it may know of a model."""
        return self._principal.sees(model)

    @property
    def sees_all(self) -> bool:
        """Whether it may know of every model."""
        return self._principal.sees_all

    def counted_as(self, wish: str, connection: str) -> str:
        """Whom the scheduler counts its calls for: the principal, whatever the caller would like to be called.

        wish: as the caller says, or empty. Where there are no principals, and among those who are nobody, the wish
        counts, else the connection; no such name is a principal's.
        """
        if not self._authority.closed:
            return wish or connection
        if self.name == ANONYMOUS:
            return f"{ANONYMOUS}/{wish or connection}"
        return self.name


_current: ContextVar[Caller | None] = ContextVar("pullback_caller", default=None)


def enter(caller: Caller) -> None:
    """Has `caller()` say so for the rest of the task, and in those that it starts."""
    _current.set(caller)


def caller() -> Caller:
    """Who makes the call that is being answered. Raises Fault (INTERNAL) outside of one: nobody gets in by that."""
    found = _current.get()
    if found is None:
        raise Fault(Reason.INTERNAL, "a call was not asked who makes it")
    return found


def sees(model: str) -> bool:
    """Whether the present caller may know of a model."""
    found = _current.get()
    return found is not None and found.sees(model)
