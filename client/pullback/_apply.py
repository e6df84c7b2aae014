"""Runs ops on tensors: picks the session, sends what is not there yet, makes tensors of the answer."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pullback import errors
from pullback._arrays import Array, as_array, refuse_torch_graph
from pullback._current import session_now
from pullback._frames import Keep, Operand
from pullback._grad_mode import is_grad_enabled
from pullback._lineage import VIEWS, Leaves, Ref, merged
from pullback._loss import Loss
from pullback._session import BLOCK, Callee, HandleInfo, Session, current
from pullback._sharing import flagged, written
from pullback._tensor import Tensor
from pullback._transport import Transport
from pullback_wire.v1 import function_pb2

#: Outputs of at most so many bytes come along with the answer.
FETCH_BELOW = 64 << 10
#: The same where nobody waits for the answer.
_FETCH_BELOW_PIPELINED = 1 << 10


def choose_session(
    tensors: Iterable[Tensor], transport: Transport | None = None, model: tuple[str, str] | None = None
) -> Session:
    """The session for an op on these tensors.

    It is the one that holds those which have no data here; else one that a tensor was made for; else that of the
    `with` around; else one that has met any of them; else the client's own.

    Raises BadHandle for tensors of different sessions, SessionLost, RuntimeError where it is unclear.
    """
    bound: Session | None = None
    home: Session | None = None
    met: Session | None = None
    wanted = transport
    for tensor in tensors:
        wanted = wanted or tensor.transport
        session = tensor.bound_session
        if session is None:
            continue
        if not tensor.is_portable:
            if bound is not None and bound is not session:
                raise errors.BadHandle(
                    f"tensors of two sessions meet: {bound!r} and {session!r}; carry one over with "
                    "session.tensor(t.numpy()), which cuts its graph"
                )
            bound = session
        elif session not in (home, met) and session.is_alive():
            home = home or (session if tensor.is_at_home else None)
            met = met or session
    if bound is not None:
        if transport is not None and bound.transport.address != transport.address:
            raise errors.BadHandle(
                f"a tensor on {bound.transport.address.target} is given to a model on {transport.address.target}; "
                "carry it over with client.tensor(t.numpy()), which cuts its graph"
            )
        return bound
    around = current.get()
    for session in (home, around, met):
        if session is not None and (transport is None or session.transport.address == transport.address):
            return session
    return session_now(wanted, model)


class Arguments:
    """The tensor arguments of one op in one session, and what becomes of them once it is sent."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self._refs: dict[int, tuple[Tensor, Ref]] = {}
        self._kept: list[tuple[Tensor, Ref]] = []
        self._groups: list[Leaves] = []
        self.requires_grad = False

    def operand(self, value: Any, field: str, like: np.dtype[Any] | None = None) -> Operand:
        """One argument: a Tensor, or anything that `as_array` takes. like: the dtype that Python numbers get."""
        if not isinstance(value, Tensor):
            refuse_torch_graph(value, field)
            array = as_array(value, field)
            return array if like is None or hasattr(value, "dtype") else array.astype(like)
        known = self._refs.get(id(value))
        if known is not None:
            return known[1].handle
        ref = value.ref_in(self.session)
        if ref is not None:
            operand: Operand = ref.handle
        else:
            ref = Ref(self.session, self.session.new_handle())
            operand = Keep(value.portable_data(), ref.handle, value.requires_grad)
            self._kept.append((value, ref))
        self._refs[id(value)] = (value, ref)
        if value.may_require_grad:
            self.requires_grad = True
            self._groups.append({ref: value} if value.is_known_leaf else value.leaves)
        return operand

    def handle(self, tensor: Tensor) -> int:
        """A handle for a tensor; it is put there first where it is not yet."""
        operand = self.operand(tensor, "tensor")
        if isinstance(operand, Keep):
            self.session.put(operand.array, operand.requires_grad, operand.handle)
            self.sent(self.session.epoch)
            return operand.handle
        assert isinstance(operand, int)
        return operand

    def leaves(self) -> Leaves:
        """The leaves that a result may depend on."""
        return merged(self._groups)

    def expose(self) -> None:
        """What comes out may share memory with what went in."""
        for tensor, _ in self._refs.values():
            tensor.exposed = True

    def sent(self, epoch: int) -> None:
        """The op is on its way: what was sent with it is in the session from now on."""
        for tensor, ref in self._kept:
            tensor.bind(ref, epoch)

    def failed(self) -> None:
        """The op failed: what was sent with it is sent anew next time, whether or not it arrived."""
        for tensor, ref in self._kept:
            tensor.unbind(ref)


def run(
    session: Session,
    arguments: Arguments,
    callee: Callee,
    inputs: Mapping[str, Operand],
    *,
    outputs: int | None = 1,
    **more: Any,
) -> list[tuple[str, Tensor]]:
    """Sends a call and makes tensors of its outputs, by name. outputs: how many there will be; None: unknown.

    Raises PullbackError.
    """
    recording = is_grad_enabled()
    known = outputs is not None and session.pipelined
    if not known:
        what = callee.model if isinstance(callee, function_pb2.Function) else "op"
        session.must_wait(f"{what!r}, whose outputs are not known before it has run,", "await model.forward(...)")
    first = session.new_handle(BLOCK if outputs is None or not isinstance(callee, str | Loss) else 1)
    pending = session.call(
        callee,
        inputs,
        handles=[first],
        no_grad=not recording,
        fetch_below=_FETCH_BELOW_PIPELINED if session.pipelined else FETCH_BELOW,
        **more,
    )
    arguments.sent(pending.epoch)
    leaves = arguments.leaves() if recording and callee != "detach" else {}
    if not isinstance(callee, str) or callee in VIEWS:
        arguments.expose()
    if known:
        assert outputs is not None
        return [("", Tensor.coming(pending, index, Ref(session, first + index), leaves)) for index in range(outputs)]
    try:
        infos = session.settle(pending)
    except errors.PullbackError:
        arguments.failed()
        session.release(first)
        raise
    return [(info.name, Tensor.made(info, pending.epoch, Ref(session, info.handle), leaves)) for info in infos]


def run_in_place(target: Tensor, name: str, others: Mapping[str, Any], options: Mapping[str, Any]) -> Tensor:
    """An operation that changes `target`. Raises PullbackError."""
    session = target.bound_session
    if session is None or not session.usable:
        session = choose_session([target, *(one for one in others.values() if isinstance(one, Tensor))])
    arguments = Arguments(session)
    inputs = {"input": arguments.operand(target, "input")}
    rest = Arguments(session)
    rest._refs.update(arguments._refs)
    for key, one in others.items():
        bare = not isinstance(one, Tensor) and not hasattr(one, "dtype")
        inputs[key] = rest.operand(one, key, target.dtype if bare else None)
    recording = is_grad_enabled()
    flag = name == "requires_grad_"
    refusable = target.is_known_leaf and target.may_require_grad
    # What it makes of others is known when it is known to have worked. By then all that was sent before is known.
    settles = not session.pipelined or flag or (recording and (rest.requires_grad or refusable))
    if settles:
        session.must_wait(f"{name} in place where a graph is recorded", "await session.run(function)")
    pending = session.call(name, inputs, options=options, handles=(), no_grad=not recording, changes=not flag)
    arguments.sent(pending.epoch)
    rest.sent(pending.epoch)
    infos: list[HandleInfo] = []
    failure: errors.PullbackError | None = None
    if settles:
        try:
            infos = session.settle(pending)
        except errors.PullbackError as error:
            if not pending.succeeded():
                arguments.failed()
                rest.failed()
                raise
            # Of an earlier op.
            infos, failure = pending.result(), error
    target.learn()
    if flag:
        flagged(session, target)
    else:
        target.changed()
        new = rest.requires_grad or not target.may_require_grad
        if recording and new and any(info.requires_grad for info in infos):
            leaves = rest.leaves()
            for leaf in leaves.values():
                session.written[id(leaf)] = weakref.ref(leaf)
            written(session, target, leaves)
    if failure is not None:
        raise failure
    return target


def as_gradient(value: Any, field: str, dtype: np.dtype[Any] | None) -> Array | Tensor:
    """A cotangent: Python numbers and lists of them take the output's dtype, all else keeps its own."""
    if isinstance(value, Tensor):
        return value
    refuse_torch_graph(value, field)
    array = as_array(value, field)
    if isinstance(value, bool | int | float | complex | list | tuple) and dtype is not None:
        return array if array.dtype == dtype else np.asarray(value).astype(dtype)
    return array
