"""`RemoteModule`: a hosted model inside a local network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import forward_ad

from pullback import errors
from pullback._anomaly import is_anomaly_enabled
from pullback._arrays import Array, as_array
from pullback._current import session_now
from pullback._frames import Operand
from pullback._info import ModelInfo
from pullback._lineage import Ref
from pullback._model import RemoteModel
from pullback._remote_call import _named, session_signature
from pullback._session import Session
from pullback._tensor import Tensor as ServerTensor
from pullback.torch._mirror import Copies, mirror
from pullback.torch._node import NO_FORWARD_MODE, NO_TRANSFORMS, Node, Results, Step, Tensors
from pullback_wire.v1 import function_pb2

#: Floating-point types that autocast turns into each other.
_AUTOCAST = (torch.float16, torch.bfloat16, torch.float32)


class RemoteModule(nn.Module):
    """A hosted model as a layer: its forward runs on the server, and gradients of any order flow through it.

        net = nn.Sequential(nn.Linear(8, 3), RemoteModule(client.model("small")), nn.Linear(2, 1))

    model: from `Client.model`.
    parameters: True: the hosted parameters become local nn.Parameters of the same names ("fc1.weight"), which start
        with the hosted values and are given with each call: local optimisers train them, state_dict holds them, and
        the hosted model stays as it is. A name, or a list of names and globs (["head.*"]), for those alone. Only those
        that have changed are sent, which takes another copy of them here. Buffers are not mirrored.
    session: where it runs; None: in the session of the `with client.session():` around, else in the client's own.
    max_order: the highest order of derivative that will be asked for; None: any. With 1 the server may use kernels that
        are faster and have no second derivatives.

    Called as the model's code is: by position, by name, None for what is left out. It returns one tensor where there is
    one output, else a dict by name. Tensors travel in the dtype they have; only under autocast, inputs of 16 and 32
    bits take the dtype that the model declares. Outputs come in the dtype that the server computed, on the device of
    the first tensor that was given.

    train() and eval() set the mode of the hosted model for these calls (its BatchNorm statistics never move). What it
    draws at random is seeded by torch's own generator: torch.manual_seed makes runs repeatable, and a forward that
    torch.utils.checkpoint runs again draws the same. Backward sees the forward's own graph, dropout masks included.

    The graph lives on the server until torch frees its side of it: after a backward without retain_graph, or with the
    outputs. A lost session loses its graphs, and their backward raises; the next forward opens another.

    Works under torch.utils.checkpoint, in many threads, in forked processes, with is_grads_batched; torch.compile
    leaves it out of its graphs. Not inside torch.func transforms, and without forward mode. Copies and pickles; a copy
    sends its parameters anew, an unpickled one uses its client's own session.

    Inside torch.autograd.detect_anomaly(), calls and backwards raise NonFinite where what the server would return is
    NaN or infinite, naming the operation and the hosted module that made it.

    Raises, from calls and from their backward: PullbackError. OrderUnavailable for a derivative that the hosted model
    does not have: with create_graph it is raised by the backward, as a gradient without a graph would be wrong later.
    From the constructor: TypeError, ValueError, BadName for a parameter that is none, PullbackError.
    """

    def __init__(
        self,
        model: RemoteModel,
        parameters: bool | str | Sequence[str] = False,
        *,
        session: Session | None = None,
        max_order: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, RemoteModel):
            raise TypeError(f"model is a {type(model).__name__}, expected what client.model(name) returns")
        if session is not None and session.transport.address != model._caller.transport.address:
            raise ValueError(f"{session!r} is no session with {model._caller.target}, where the model is")
        # Under names that no hosted parameter has: theirs stand beside these.
        self._pullback_remote = _Remote(model, session, max_order)
        wanted = ["*"] if parameters is True else [parameters] if isinstance(parameters, str) else parameters or ()
        if wanted:
            mirror(self, self._pullback_remote.session(), model, wanted, self._pullback_remote.copies)

    def extra_repr(self) -> str:
        """The model, for repr."""
        return repr(self._pullback_remote.model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the hosted model on tensors, numpy arrays or numbers; gradients flow to tensors that require them.

        Raises TypeError for what is no input, RuntimeError inside torch.func transforms, PullbackError.
        """
        return _outside(self, args, kwargs) if torch.compiler.is_compiling() else self._run(args, kwargs)

    def _run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        remote = self._pullback_remote
        inputs = remote.inputs(args, kwargs)
        parameters = dict(self.named_parameters(remove_duplicate=False))
        record = torch.is_grad_enabled()
        tensors = [one for one in (*inputs.values(), *parameters.values()) if isinstance(one, torch.Tensor)]
        _check_plain(tensors)
        sources = [one for one in tensors if one.requires_grad] if record else []
        step = Call(
            remote,
            inputs,
            parameters,
            record=bool(sources),
            train=self.training,
            device=tensors[0].device if tensors else torch.device("cpu"),
        )
        try:
            outputs = Node.apply(step, *sources) if sources else step.run(())  # type: ignore[no-untyped-call]
        except errors.BadName:
            # The model may have another signature by now; the next call asks.
            remote.model._caller.forget()
            raise
        if len(outputs) == 1:
            return outputs[0]
        return dict(zip(step.names, outputs, strict=True))


def _outside(module: RemoteModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Leaves the graph that torch.compile is tracing. Not by a decorator, which would cost seconds at import."""
    import torch._dynamo

    return torch._dynamo.disable(module._run)(args, kwargs)  # type: ignore[no-untyped-call]


class _Remote:
    """Where a module's calls go. Not part of what torch copies: a copy of a module has copies of its own."""

    def __init__(self, model: RemoteModel, session: Session | None, max_order: int | None) -> None:
        self.model = model
        self.max_order = max_order
        self.copies = Copies()
        self._session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> _Remote:
        return _Remote(self.model, self._session, self.max_order)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_Remote, (self.model, None, self.max_order))

    def session(self) -> Session:
        """The session for a call that begins now. Raises PullbackError."""
        if self._session is not None:
            return self._session
        return session_now(self.model._caller.transport, (self.model.name, self.model.version))

    def inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, torch.Tensor | Array]:
        """Arguments by name. Raises TypeError."""
        named = _named(self.model._caller, args, kwargs, self._signature)
        return {name: _as_input(value, name) for name, value in self._autocast(named).items()}

    def _signature(self) -> ModelInfo:
        return session_signature(self.model._caller, self.session())

    def _autocast(self, named: dict[str, Any]) -> dict[str, Any]:
        declared = None
        for name, value in named.items():
            if not isinstance(value, torch.Tensor) or not torch.is_autocast_enabled(value.device.type):
                continue
            if declared is None:
                declared = {spec.name: getattr(torch, spec.dtype) for spec in self._signature().inputs if spec.dtype}
            wanted = declared.get(name, value.dtype)
            if value.dtype in _AUTOCAST and wanted in _AUTOCAST:
                named[name] = value.to(wanted)
        return named


def _as_input(value: Any, name: str) -> torch.Tensor | Array:
    if isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray | np.generic | bool | int | float | complex):
        return as_array(value, f"inputs[{name!r}]")
    hint = "; as the server holds it, call the client's RemoteModel on it" if isinstance(value, ServerTensor) else ""
    raise TypeError(
        f"inputs[{name!r}] is a {type(value).__name__}, expected a torch tensor, an array or a number{hint}"
    )


def _check_plain(tensors: Tensors) -> None:
    """Raises for tensors whose derivatives would be lost on the way."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(NO_TRANSFORMS)
    if forward_ad._current_level < 0:
        return
    unpack: Callable[[torch.Tensor], forward_ad.UnpackedDualTensor] = forward_ad.unpack_dual
    if any(unpack(one).tangent is not None for one in tensors):
        raise NotImplementedError(NO_FORWARD_MODE)


class Call(Step):
    """A run of the hosted model. names: of the outputs, once it has run.

    The node's tensors are the inputs and then the parameters that require grad.
    """

    def __init__(
        self,
        remote: _Remote,
        inputs: Mapping[str, torch.Tensor | Array],
        parameters: Mapping[str, nn.Parameter],
        *,
        record: bool,
        train: bool,
        device: torch.device,
    ) -> None:
        super().__init__(remote.session(), record)
        self.names: list[str] = []
        self._remote = remote
        self._inputs = inputs
        self._parameters = parameters
        self._train = train
        self._device = device

    def run(self, tensors: Tensors) -> Results:
        """The outputs."""
        session, copies = self.session, self._remote.copies
        every: list[Ref | None] = []
        inputs = {name: self._operand(value, name, every) for name, value in self._inputs.items()}
        parameters: dict[str, Operand] = {}
        given = {}
        for name, parameter in self._parameters.items():
            given[name], parameters[name] = copies.copy(session, name, parameter, self.record)
            every.append(given[name].ref if parameter.requires_grad else None)
        model = self._remote.model
        pending = session.call(
            function_pb2.Function(
                model=model.name,
                version=model.version,
                detect_anomaly=torch.is_anomaly_enabled() or is_anomaly_enabled(),
            ),
            inputs,
            parameters=parameters,
            train=self._train,
            # Drawn in eval mode too: some models draw random numbers in any, and a forward that checkpoint runs again
            # must draw the same.
            seed=int(torch.randint(1 << 62, (), device="cpu")),
            no_grad=not self.record,
            max_order=self._remote.max_order,
            fetch=True,
        )
        infos = pending.result()
        # Not before the server has them: another thread's op might get ahead of this one.
        copies.keep(given)
        self.names = [info.name for info in infos]
        # The node has those that require grad for its tensors.
        return self.take(pending, [leaf for leaf in every if leaf is not None], [self._device] * len(infos))

    def _operand(self, value: torch.Tensor | Array, name: str, leaves: list[Ref | None]) -> Operand:
        return self.operand(value, f"inputs[{name!r}]", leaves) if isinstance(value, torch.Tensor) else value
