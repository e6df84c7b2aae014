"""backward() and grad(): one Grad op each, and what is done with its gradients."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pullback import errors
from pullback._anomaly import is_anomaly_enabled
from pullback._apply import FETCH_BELOW, Arguments, as_gradient, choose_session
from pullback._fork import gate
from pullback._frames import HandleInfo, Operand
from pullback._lineage import Leaves, Ref, merged
from pullback._session import Pending, Session
from pullback._tensor import Tensor

#: A gradient of at most so many bytes comes along with a backward, and so many bytes in all: most are read at once.
_FETCH_BELOW = 512 << 10
_FETCH_IN_ALL = 1 << 20

#: Held while a `.grad` is read and set anew. A few serve all tensors, and nobody holds two of them. By generation, so
#: that no fork can leave one locked.
_locks: dict[tuple[int, int], threading.Lock] = {}
_LOCKS = 61


def _lock_of(tensor: Tensor) -> threading.Lock:
    return _locks.setdefault((gate.generation, id(tensor) // 16 % _LOCKS), threading.Lock())


class _Run:
    """The outputs and cotangents of one call, in their session."""

    def __init__(self, outputs: Sequence[Tensor], gradients: Sequence[Any], batched: bool = False) -> None:
        if len(gradients) != len(outputs):
            raise ValueError(f"{len(outputs)} tensors and {len(gradients)} gradients are given")
        for position, output in enumerate(outputs):
            if not isinstance(output, Tensor):
                raise TypeError(f"outputs[{position}] is a {type(output).__name__}, expected a Tensor")
            if not output.may_require_grad:
                raise errors.NotDifferentiable(
                    f"outputs[{position}] does not require grad: nothing that it was made of does (a model's "
                    "parameters do once model.parameters() were taken in the same session), or it was made under "
                    "no_grad or by detach()"
                )
        bound = [output.bound_session for output in outputs if not output.is_portable]
        self.session: Session = next((one for one in bound if one is not None), None) or choose_session(outputs)
        self.arguments = Arguments(self.session)
        self.outputs = [self.arguments.handle(output) for output in outputs]
        # The graph's leaves; those of the cotangents come on top where gradients are differentiable.
        self.leaves = self.arguments.leaves()
        self.gradients: list[Operand | None] = []
        for position, (output, gradient) in enumerate(zip(outputs, gradients, strict=True)):
            self.gradients.append(None if gradient is None else self._operand(position, output, gradient, batched))

    def _operand(self, position: int, output: Tensor, gradient: Any, batched: bool) -> Operand:
        """Raises BadCotangent where it is known here already that the shapes do not fit."""
        listed = not isinstance(gradient, Tensor) and not hasattr(gradient, "dtype")
        value = as_gradient(gradient, f"gradient of outputs[{position}]", output.dtype if listed else None)
        if not self.session.pipelined:
            shape = value.shape[1:] if batched else value.shape
            if shape != output.shape:
                raise errors.BadCotangent(
                    f"gradient of outputs[{position}] has shape {list(value.shape)}, expected that of the output, "
                    f"{list(output.shape)}{' behind one more axis' if batched else ''}"
                )
        return self.arguments.operand(value, "gradient")

    def send(
        self,
        wrt: Sequence[Ref],
        owners: Sequence[Tensor],
        retain_graph: bool | None,
        create_graph: bool,
        allow_unused: bool,
        batched: bool,
    ) -> tuple[Pending, list[HandleInfo]]:
        """Sends the op and waits for it."""
        self.session.must_wait("a backward", "await tensor.backward(), or await pullback.aio.grad()")
        room = _FETCH_IN_ALL
        # Those that will be differentiated in turn are less often read.
        most = FETCH_BELOW if create_graph else _FETCH_BELOW
        fetch = []
        for position, owner in enumerate(owners):
            # Only what is known: waiting for a shape would cost more than the value.
            size = owner.nbytes if owner.fetches_grad and owner.is_known_leaf else most + 1
            if size <= min(room, most):
                fetch.append(position)
                room -= size
        pending = self.session.grad(
            self.outputs,
            [ref.handle for ref in wrt],
            self.gradients,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=allow_unused,
            is_grads_batched=batched,
            detect_anomaly=is_anomaly_enabled(),
            fetch=fetch,
        )
        self.arguments.sent(pending.epoch)
        try:
            return pending, self.session.settle(pending)
        except errors.PullbackError:
            self.arguments.failed()
            raise

    def made(self, pending: Pending, info: HandleInfo, create_graph: bool) -> Tensor | None:
        """A gradient as a tensor."""
        ref = Ref(self.session, info.handle)
        if info.unused:
            return None
        leaves: Leaves = self.arguments.leaves() if create_graph else {}
        return Tensor.made(info, pending.epoch, ref, leaves)


def backward(
    outputs: Sequence[Tensor],
    gradients: Sequence[Any],
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Tensor | Sequence[Tensor] | None = None,
) -> None:
    """See Tensor.backward and autograd.backward."""
    found = computed(outputs, gradients, retain_graph, create_graph, inputs)
    settle_sums(accumulated(found))


def paired(tensors: Tensor | Sequence[Tensor], grad_tensors: Any) -> tuple[list[Any], list[Any]]:
    """What autograd.backward was given, as `backward` takes it."""
    one = isinstance(tensors, Tensor)
    outputs: list[Any] = [tensors] if one else list(tensors)
    if grad_tensors is None:
        return outputs, [None] * len(outputs)
    if one and not isinstance(grad_tensors, tuple | list):
        return outputs, [grad_tensors]
    return outputs, list(grad_tensors)


@dataclass
class Found:
    """What a backward found: leaves with their gradients."""

    session: Session
    pairs: list[tuple[Tensor, Tensor]]
    create_graph: bool

    @property
    def waits(self) -> bool:
        """Whether accumulating may wait: for what lies in another session."""
        before = [one.grad for one, _ in self.pairs]
        return any(grad is not None and grad.handle_in(self.session) is None for grad in before)


@dataclass
class Sums:
    """Sums that were sent, as `.grad` already: (of which tensor, what was there before, the sum, its op)."""

    sent: list[tuple[Tensor, Tensor, Tensor, Pending]]
    failure: errors.PullbackError | None = None


def computed(
    outputs: Sequence[Tensor],
    gradients: Sequence[Any],
    retain_graph: bool | None,
    create_graph: bool,
    inputs: Tensor | Sequence[Tensor] | None,
) -> Found:
    """The gradients of a backward, which are accumulated nowhere yet. Waits for the server."""
    run = _Run(outputs, gradients)
    wrt: Leaves = {}
    if inputs is None:
        wrt.update((ref, leaf) for ref, leaf in run.leaves.items() if leaf.may_require_grad)
        wrt.update(_remembered(run.session, run.session.retained))
        wrt.update(_remembered(run.session, run.session.written))
        if not run.leaves and not wrt:
            raise errors.NotDifferentiable("no leaf that requires grad is known to lie behind the tensor")
    else:
        wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
        if not wanted:
            raise ValueError("inputs is empty; None means all leaves")
        for tensor in wanted:
            wrt.update(_refs(run, tensor, "one of inputs"))
    # The leaves may have been frozen since. Then there is nothing to accumulate, but what is wrong is still said.
    frozen = {} if wrt else {output._ref: output for output in outputs if output._ref is not None}
    wrt = {ref: tensor for ref, tensor in wrt.items() if ref.session is run.session}
    asked = wrt or frozen
    pending, infos = run.send(list(asked), list(asked.values()), retain_graph, create_graph, True, False)
    made = [run.made(pending, info, create_graph) for info in infos]
    pairs = [(one, gradient) for one, gradient in zip(wrt.values(), made, strict=False) if gradient is not None]
    return Found(run.session, pairs, create_graph)


def accumulated(found: Found) -> Sums:
    """Sets `.grad`, or sends the sum with what is there. All sums are sent before the first answer is waited for.

    Threads may do this to one tensor at once: what follows what is settled by the order in which sums are sent, so
    nobody waits for an answer while others wait for the lock.
    """
    sums = Sums([])
    for tensor, gradient in found.pairs:
        with _lock_of(tensor):
            before = tensor.grad
            if before is None:
                tensor._grad = gradient
                continue
            try:
                total, pending = _sum(found.session, tensor, before, gradient, found.create_graph)
            except errors.PullbackError as error:
                sums.failure = sums.failure or error
                continue
            tensor._grad = total
        sums.sent.append((tensor, before, total, pending))
    return sums


def settle_sums(sums: Sums) -> None:
    """Waits for the sums. Raises the first failure; its `.grad` stays as it was."""
    failure = sums.failure
    for tensor, before, total, pending in sums.sent:
        try:
            pending.result()
            total.learn()
        except errors.PullbackError as error:
            failure = failure or error
            with _lock_of(tensor):
                if tensor.grad is total:
                    tensor._grad = before
    if failure is not None:
        raise failure


def _sum(
    session: Session, tensor: Tensor, before: Tensor, gradient: Tensor, create_graph: bool
) -> tuple[Tensor, Pending]:
    """Sends the sum of a gradient and what was there before. Raises PullbackError."""
    if before.handle_in(session) is None:
        # Of another session, where its value may be on its way.
        before._known()
    arguments = Arguments(session)
    operands = {"input": arguments.operand(before, "grad"), "other": arguments.operand(gradient, "gradient")}
    # A sum with what has a graph has one, as in torch.
    graph = create_graph or before.may_require_grad
    handle = session.new_handle()
    fetch = FETCH_BELOW if tensor.fetches_grad else 0
    pending = session.call("add", operands, handles=[handle], no_grad=not graph, fetch_below=fetch)
    arguments.sent(pending.epoch)
    leaves = arguments.leaves() if graph else {}
    return Tensor.coming(pending, 0, Ref(session, handle), leaves), pending


def _remembered(session: Session, references: dict[int, weakref.ref[Tensor]]) -> Leaves:
    """Those that live and require grad."""
    found: Leaves = {}
    for key, reference in list(references.items()):
        tensor = reference()
        if tensor is None:
            references.pop(key, None)
        elif tensor._ref is not None and tensor._ref.session is session and tensor.may_require_grad:
            found[tensor._ref] = tensor
    return found


def _refs(run: _Run, tensor: Any, field: str) -> Leaves:
    """What stands for a tensor in the graph; several where it was put into the session several times."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{field} is a {type(tensor).__name__}, expected a Tensor")
    if not tensor.may_require_grad:
        raise errors.NotDifferentiable(f"{field} does not require grad")
    found = {ref: tensor for ref, leaf in run.leaves.items() if leaf is tensor and ref.session is run.session}
    if found:
        return found
    if tensor.bound_session is not run.session or tensor._ref is None:
        run.arguments.handle(tensor)
    assert tensor._ref is not None
    return {tensor._ref: tensor}


def grad(
    outputs: Tensor | Sequence[Tensor],
    inputs: Tensor | Sequence[Tensor],
    grad_outputs: Any = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    allow_unused: bool | None = None,
    is_grads_batched: bool = False,
    materialize_grads: bool = False,
) -> tuple[Tensor | None, ...]:
    """See autograd.grad."""
    if materialize_grads and allow_unused is False:
        raise ValueError("materialize_grads needs allow_unused to be True or not given")
    many = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    wanted = [inputs] if isinstance(inputs, Tensor) else list(inputs)
    if not wanted:
        raise ValueError("inputs is empty")
    if grad_outputs is None:
        cotangents: list[Any] = [None] * len(many)
    elif isinstance(outputs, Tensor) and not (isinstance(grad_outputs, tuple | list) and _one_tensor(grad_outputs)):
        cotangents = [grad_outputs]
    else:
        cotangents = list(grad_outputs)
    run = _Run(many, cotangents, is_grads_batched)
    groups = [_refs(run, tensor, f"inputs[{position}]") for position, tensor in enumerate(wanted)]
    # The gradients depend on these in turn.
    wrt = merged(groups) if len(groups) == 1 else {ref: one for group in groups for ref, one in group.items()}
    unused = bool(materialize_grads or allow_unused)
    several = any(len(group) > 1 for group in groups)
    pending, infos = run.send(
        list(wrt), list(wrt.values()), retain_graph, create_graph, unused or several, is_grads_batched
    )
    found = {ref: run.made(pending, info, create_graph) for ref, info in zip(wrt, infos, strict=True)}
    results: list[Tensor | None] = []
    for tensor, group in zip(wanted, groups, strict=True):
        parts = [part for ref in group if (part := found[ref]) is not None]
        result = parts[0] if parts else None
        for part in parts[1:]:
            assert result is not None
            result = result + part
        if result is None and several and not unused:
            raise errors.UnusedInput("one of inputs is not used by the outputs; allow_unused=True gives None for it")
        if result is None and materialize_grads:
            kind = run.session.tensor_type or Tensor
            result = kind(np.zeros(tensor.shape, tensor.dtype), home=run.session)
        results.append(result)
    return tuple(results)


def _one_tensor(value: Sequence[Any]) -> bool:
    """Whether a sequence is the one-element sequence of cotangents, and not a cotangent written as a list."""
    return len(value) == 1 and (value[0] is None or hasattr(value[0], "shape"))
