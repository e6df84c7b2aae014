"""Which tensors of a session share memory, as the server tells, and what a write to one of them makes of the others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from pullback import errors
from pullback._lineage import Leaves

if TYPE_CHECKING:
    from pullback._session import Session
    from pullback._tensor import Tensor


def sharing(session: Session, tensor: Tensor) -> list[Tensor]:
    """The other tensors of this process that share memory with one, as far as answers have come."""
    handle = tensor.handle_in(session)
    found: list[Tensor] = []
    for beside in () if handle is None else session.memory.beside(handle):
        other = session.living.get(beside)
        # Not one that meanwhile stands for another handle.
        if other is not None and other is not tensor and other.handle_in(session) == beside:
            other.learn()
            found.append(other)
    return found


def written(session: Session, target: Tensor, leaves: Leaves) -> None:
    """An operation wrote what depends on `leaves` into a tensor, which requires grad since.

    So do its views, and what it is a view of; but not what only lies in the same memory, as detach() has it. Only the
    server knows which is which.
    """
    target.depend_on(leaves)
    unsure = []
    for other in sharing(session, target):
        if other.may_require_grad:
            other.depend_on(leaves)
        else:
            unsure.append(other)
    for other in _requiring_grad(session, unsure):
        other.depend_on(leaves)


def flagged(session: Session, target: Tensor) -> None:
    """requires_grad was set of a leaf: others may be the very same tensor there, as a model may return its input."""
    leaves = [one for one in sharing(session, target) if one.is_known_leaf]
    on = _requiring_grad(session, leaves)
    for other in leaves:
        other.flag(any(other is one for one in on))


def _requiring_grad(session: Session, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those that require grad on the server, found out by a view of each. Raises SessionLost."""
    asked = []
    for tensor in tensors:
        handle, view = tensor.handle_in(session), session.new_handle()
        if handle is not None:
            asked.append((tensor, session.call("unsqueeze", {"input": handle}, options={"dim": 0}, handles=[view])))
            session.release(view)
    found = []
    for tensor, pending in asked:
        try:
            if pending.result()[0].requires_grad:
                found.append(tensor)
        except errors.SessionLost:
            raise
        except errors.PullbackError:
            # It is lost itself, as whoever uses it will be told.
            continue
    return found
