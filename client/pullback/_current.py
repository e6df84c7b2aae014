"""Which session a tensor without one is used in."""

from __future__ import annotations

import threading

from pullback import errors
from pullback._fork import gate
from pullback._session import Session, current
from pullback._transport import Transport

#: By generation, so that no fork can leave one locked.
_locks: dict[int, threading.Lock] = {}


def _sessions(transport: Transport) -> dict[int, Session]:
    """The client's own session, by generation."""
    found: dict[int, Session] = transport.belongings.setdefault("sessions", {})
    return found


def default_session(transport: Transport, model: tuple[str, str] | None = None) -> Session:
    """The client's own session in this process; opened when there is none that lives.

    model: what it is opened for, so that it comes to a worker that has it. Raises PullbackError.
    """
    found = _found(transport)
    if found is None:
        with _locks.setdefault(gate.generation, threading.Lock()):
            found = _found(transport)
            if found is None:
                found = Session(transport, [model] if model else [])
                # Of an ended session, or of the process that this one was forked from.
                for earlier in _sessions(transport).values():
                    lost_parameters(transport).update(key for key, taken in earlier.model_parameters.items() if taken)
                _sessions(transport)[gate.generation] = found
    return found


def is_default(session: Session, transport: Transport) -> bool:
    """Whether it is the client's own."""
    return any(one is session for one in _sessions(transport).values())


def lost_parameters(transport: Transport) -> set[tuple[str, str]]:
    """Models (name, version) whose parameters were taken in the client's own session, which is no more.

    Using the hosted ones in their place, without a word, would be another function.
    """
    found: set[tuple[str, str]] = transport.belongings.setdefault("lost_parameters", set())
    return found


def _found(transport: Transport) -> Session | None:
    found = _sessions(transport).get(gate.generation)
    if found is None or transport.closed or not found.is_alive() or found.going_away:
        return None
    return found


def session_now(transport: Transport | None = None, model: tuple[str, str] | None = None) -> Session:
    """The session for what belongs to none yet: that of the `with` around, else the client's own.

    transport: whose it must be; None: anyone's, where that leaves no doubt.

    Raises RuntimeError where it is unclear, or PullbackError where none can be opened.
    """
    around = current.get()
    if around is not None and (transport is None or around.transport.address == transport.address):
        return around
    if transport is None:
        clients = [one for one in list(Transport.everyone) if not one.closed]
        if len({one.address for one in clients}) != 1:
            held = "no client is connected" if not clients else f"{len(clients)} clients are connected"
            raise RuntimeError(
                f"which session is this for? {held}; use `with client.session():`, or make tensors by "
                "client.tensor(...)"
            )
        transport = next((one for one in clients if _found(one)), clients[0])
    if not transport.has_own_session:
        raise RuntimeError("an asyncio client has no session of its own: use `async with client.session():`")
    return default_session(transport, model)


def end_default(transport: Transport) -> None:
    """Ends the client's own session, as the client is closed."""
    session = _sessions(transport).pop(gate.generation, None)
    if session is not None:
        session._stream.fail(errors.ClientClosed(f"the client of {transport.address.target} is closed"))
