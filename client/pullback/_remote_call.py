"""Models called on tensors, and their parameters as tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pullback import errors
from pullback._anomaly import is_anomaly_enabled
from pullback._apply import Arguments, choose_session, run
from pullback._caller import Caller
from pullback._current import is_default, lost_parameters, session_now
from pullback._info import ModelInfo
from pullback._lineage import Ref
from pullback._session import Session
from pullback._tensor import Tensor
from pullback_wire import numpy_dtype
from pullback_wire.dtypes import dtype_number
from pullback_wire.v1 import function_pb2


def call_model(
    caller: Caller,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    parameters: Mapping[str, Any] | None,
    train: bool,
    seed: int | None,
    max_order: int | None,
    detect_anomaly: bool = False,
) -> Tensor | dict[str, Tensor]:
    """See RemoteModel.__call__."""
    given = {name: value for name, value in dict(parameters or {}).items() if value is not None}
    model = (caller.name, caller.version)
    values = [*args, *kwargs.values(), *given.values()]
    session = choose_session([one for one in values if isinstance(one, Tensor)], caller.transport, model)
    named = _named(caller, args, kwargs, lambda: session_signature(caller, session))
    taken = session.model_parameters.get(model, {})
    if not taken and not given and model in lost_parameters(caller.transport) and is_default(session, caller.transport):
        raise errors.SessionLost(
            f"model {caller.name!r}: the parameters taken from it, and what was done to them, were lost with their "
            "session; model.parameters() takes the hosted ones anew"
        )
    given = {**taken, **given}
    arguments = Arguments(session)
    inputs = {name: arguments.operand(value, f"inputs[{name!r}]") for name, value in named.items()}
    more = {name: arguments.operand(value, f"parameters[{name!r}]") for name, value in given.items()}
    function = function_pb2.Function(
        model=caller.name, version=caller.version, detect_anomaly=detect_anomaly or is_anomaly_enabled()
    )
    names = [one.name for one in session_signature(caller, session).outputs] if session.pipelined else []
    try:
        outputs = run(
            session,
            arguments,
            function,
            inputs,
            outputs=len(names) or None,
            parameters=more,
            train=train,
            seed=seed,
            max_order=max_order,
        )
    except errors.BadName:
        caller.forget()
        raise
    if len(outputs) == 1:
        return outputs[0][1]
    return {
        announced or name: one for announced, (name, one) in zip(names or [""] * len(outputs), outputs, strict=True)
    }


def session_signature(caller: Caller, session: Session) -> ModelInfo:
    """As it is when the session first uses the model: a session keeps its version, whatever comes into service."""
    model = (caller.name, caller.version)
    found = session.signatures.get(model)
    if found is None:
        session.must_wait(
            f"model {caller.name!r}: its signature", "client.session(models=[model]), or await session.use(model)"
        )
        caller.forget()
        found = session.signatures.setdefault(model, caller.signature())
    return found


def _named(
    caller: Caller,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    signature: Callable[[], ModelInfo] | None = None,
) -> dict[str, Any]:
    """Arguments by the names of the model's code. Raises TypeError as a Python function does.

    signature: asked where arguments are given by position; None: the caller's.
    """
    named: dict[str, Any] = {}
    if args:
        names = [spec.name for spec in (signature or caller.signature)().inputs]
        if len(args) > len(names):
            takes = ", ".join(map(repr, names)) or "none"
            raise TypeError(f"model {caller.name!r} takes {len(names)} inputs ({takes}), {len(args)} are given")
        named.update(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name in named:
            raise TypeError(f"model {caller.name!r} got input {name!r} twice")
        named[name] = value
    return {name: value for name, value in named.items() if value is not None}


def take_parameters(caller: Caller, session: Session | None) -> dict[str, Tensor]:
    """The parameters in a session, made there when they are first asked for. Raises PullbackError."""
    model = (caller.name, caller.version)
    session = session_now(caller.transport, model) if session is None else session
    taken = session.model_parameters.get(model)
    if taken is None:
        info = session_signature(caller, session)
        # Others, quantised ones for example, have no gradients; calls use the hosted ones.
        specs = [one for one in info.parameters if one.dtype and one.dtype.startswith(("float", "bfloat", "complex"))]
        names = [spec.name for spec in specs]
        taken = {}
        if names:
            handles = session.parameters(caller.name, caller.version, names)
            refs = [Ref(session, handle) for handle in handles]
            for spec, ref in zip(specs, refs, strict=True):
                dtype = numpy_dtype(dtype_number(spec.dtype or ""))
                shape = tuple(one for one in spec.shape or () if isinstance(one, int))
                taken[spec.name] = Tensor.parameter(ref, dtype, shape)
        # Two threads may come here at once; the first one's stay.
        taken = session.model_parameters.setdefault(model, taken)
    lost_parameters(caller.transport).discard(model)
    return taken


def taken_parameters(caller: Caller, session: Session | None) -> Iterator[Tensor]:
    """Those that were taken already; none is made."""
    session = session_now(caller.transport, (caller.name, caller.version)) if session is None else session
    yield from session.model_parameters.get((caller.name, caller.version), {}).values()
