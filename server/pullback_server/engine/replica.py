"""A hosted module with other parameters or buffers in it, for one call whose graph may outlive many others.

A backward may run modules again (torch.utils.checkpoint, a Function that calls one, a hook) and must find them as the
forward did. Most models' do not: their graphs hold torch's own nodes and tensors only, and it is enough to exchange
what the hosted module holds until its forward has run. A model whose graph holds anything else runs on a copy of its
modules that is that graph's own; whatever reaches the original instead is refused, in the forward and in the backward.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pullback_server.engine import provenance
from pullback_server.engine.call import Again, out_of_memory, text_of
from pullback_server.engine.hosted import HostedModel
from pullback_server.engine.reach import Reference, tensors_from
from pullback_server.engine.tape_state import Lineage
from pullback_server.engine.tripwire import is_foreign
from pullback_server.faults import Fault
from pullback_wire import Reason

Code = Callable[..., Any]


class _Captured(Exception):
    """Code of the replica reached for a module or parameter of the original."""


class _Trap(torch.Tensor):
    """Stands in the original for what the replica has of its own: no operation takes it."""

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        raise _Captured


def _trap() -> torch.Tensor:
    return torch.empty(0).as_subclass(_Trap)


_TRAP = _trap()

#: What to do when somebody looks at an original that is closed: by its id.
_closed: dict[int, Callable[[], None]] = {}
_closing: dict[type, type | None] = {}


def _closing_class(kind: type) -> type | None:
    """The class of a module while it is closed; None where there can be none."""
    if kind not in _closing:
        _closing[kind] = _closing_class_of(kind)
    return _closing[kind]


def _closing_class_of(kind: Any) -> type | None:
    if type(kind) is not type or any("__init_subclass__" in vars(base) for base in kind.__mro__ if base is not object):
        # Whoever counts subclasses must not get to see another one.
        return None

    def look(self: Any, name: str) -> Any:
        if found := _closed.get(id(self)):
            found()
        return inherited(self, name)

    inherited: Any = kind.__getattribute__
    return type(kind.__name__, (kind,), {"__getattribute__": look, "__module__": kind.__module__})


@contextmanager
def _closed_off(hosted: HostedModel, as_it_stands: Callable[[HostedModel], bool]) -> Iterator[None]:
    """While a replica runs, nothing may look at the original. Raises Fault (UNSUPPORTED_BY_MODEL).

    as_it_stands: whether, just now, something runs that is no replica's.
    """
    module = hosted.module
    assert module is not None
    originals = list(module.modules())
    captured = False

    def look() -> None:
        nonlocal captured
        if not as_it_stands(hosted):
            captured = True
            raise _Captured

    def look_at_call(called: nn.Module, _: Any) -> None:
        if id(called) in _closed:
            look()

    handle = nn.modules.module.register_module_forward_pre_hook(look_at_call)
    kinds = [(original, type(original)) for original in originals]
    try:
        for original, kind in kinds:
            _closed[id(original)] = look
            if (closing := _closing_class(kind)) is not None:
                object.__setattr__(original, "__class__", closing)
        yield
    except BaseException as error:
        captured = captured or isinstance(error, _Captured)
        if not captured:
            raise
    finally:
        for original, kind in kinds:
            _closed.pop(id(original), None)
            if type(original) is not kind:
                object.__setattr__(original, "__class__", kind)
        handle.remove()
    if captured:
        raise _unsupported(
            hosted,
            "its code reaches modules other than through the module that it is part of (a closure, a default argument, "
            "a global name); its author can let it reach them through `self` alone, as it is at the time of the call",
        )


def _unsupported(hosted: HostedModel, why: str) -> Fault:
    return Fault(
        Reason.UNSUPPORTED_BY_MODEL,
        f"{hosted.owner} can be given no parameters and no train mode in a session: {why}",
    )


def guarded(lineage: Lineage) -> contextlib.AbstractContextManager[object]:
    """Around a backward, which may run modules again: those of replicas only, where replicas made the graph."""
    if not lineage.apart:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    for hosted in lineage.apart:
        stack.enter_context(_closed_off(hosted, provenance.runs_as_it_stands))
    return stack


def _never(_: HostedModel) -> bool:
    return False


class Stage:
    """Where a call of a model runs.

    swaps: what stands for parameters, by name. train: train mode. private: buffers of its own.
    """

    def __init__(self, hosted: HostedModel, swaps: Mapping[str, torch.Tensor], train: bool) -> None:
        self._hosted = hosted
        self._swaps = swaps
        self._train = train and hosted.module is not None
        self._private = hosted.module is not None and (train or hosted.writes_buffers)
        self._replica: nn.Module | None = None
        self._traces = provenance.Traces()

    @property
    def changes(self) -> bool:
        """Whether the module must be other than it stands."""
        return bool(self._swaps) or self._private or self._train

    @property
    def apart(self) -> bool:
        """Whether it ran on a replica."""
        return self._replica is not None

    @property
    def hooks(self) -> bool:
        """Whether hooks were hung on tensors, nodes or modules."""
        return self._traces.hooks

    @contextmanager
    def code(self) -> Iterator[Code]:
        """What to call, for as long as the forward runs. Raises Fault (UNSUPPORTED_BY_MODEL)."""
        hosted = self._hosted
        module = hosted.module
        if hosted.stock and module is not None:
            if not self.changes:
                yield hosted.code
                return
            with self._exchanged(module):
                yield hosted.code
        elif not self.changes or module is None:
            with self._traces.watching():
                yield hosted.code
        elif hosted.recomputes or self._kept_elsewhere():
            replica = self._replica = self._copied(module)
            undo = hosted.swap(dict.fromkeys(self._swaps, _TRAP), False)
            try:
                with _closed_off(hosted, _never), self._traces.watching():
                    yield replica
            finally:
                undo()
        else:
            with self._exchanged(module), self._traces.watching():
                yield hosted.code

    def _kept_elsewhere(self) -> bool:
        """Whether the module finds what is to be exchanged in other places, too. Raises Fault where a copy would."""
        hosted = self._hosted
        found: list[tuple[str, Reference]] = [
            (f"parameter {name!r}", hosted.kept[name]) for name in self._swaps if name in hosted.kept
        ]
        if self._private:
            found += [(f"buffer {name!r}", place) for name, place in hosted.kept_buffers.items()]
        for what, place in found:
            if not place.copied or (hosted.writes_buffers and what.startswith("buffer")):
                raise _unsupported(
                    hosted,
                    f"it keeps its {what} in {place.place} as well, where nothing else can take its place; its author "
                    "can look it up in its module when it is used",
                )
        return bool(found)

    @contextmanager
    def _exchanged(self, module: nn.Module) -> Iterator[None]:
        hosted = self._hosted
        undo = [hosted.swap(self._swaps, self._private)]
        if not hosted.stock:
            undo.append(_computed(module))
        try:
            if self._train:
                undo.append(hosted.enter_training())
            yield
        finally:
            while undo:
                undo.pop()()

    def check(self, outputs: Sequence[torch.Tensor]) -> None:
        """With what a forward returned: whether its backward runs modules again. Raises Again, having learned it.

        Marks the new nodes as the model's.
        """
        hosted, traces = self._hosted, self._traces
        if hosted.stock:
            return
        nodes = provenance.fresh(outputs)
        if not nodes:
            return
        again = traces.packs or traces.hooks or hosted.hooked
        changed = self.changes and not self.apart
        if changed and (again or any(is_foreign(node) or provenance.packs(node) for node in nodes)):
            hosted.recomputes = True
            raise Again
        provenance.claim(hosted, nodes, again or self.apart, traces.hooks, self.apart)
        if self._replica is not None and not _leads_back(self._replica, outputs):
            provenance.keep(self._replica, outputs)

    def _copied(self, module: nn.Module) -> nn.Module:
        hosted = self._hosted
        # Sessions run code that torch.compile was applied to as it was written.
        while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        if any(isinstance(child, torch.jit.ScriptModule) for child in module.modules()):
            # torch copies it without looking at what is to be exchanged.
            raise _unsupported(hosted, "it is TorchScript in part, of which no copy with others can be made")
        memo: dict[int, Any] = {id(own): self._swaps.get(name, own) for name, own in hosted.parameters.items()}
        for buffer, pristine in hosted.buffers():
            memo[id(buffer)] = pristine.clone() if self._private else buffer
        for child in module.modules():
            for value in vars(child).values():
                # What a hook computed from parameters (weight_norm); it will be computed anew.
                if isinstance(value, torch.Tensor) and not value.is_leaf:
                    memo[id(value)] = value.detach()
        try:
            replica: nn.Module = copy.deepcopy(module, memo)
        except BaseException as error:
            if out_of_memory(error):
                raise
            raise _unsupported(hosted, f"it cannot be copied: {type(error).__name__}: {text_of(error)}") from error
        if self._train:
            replica.train()
        return replica


def _computed(module: nn.Module) -> Callable[[], None]:
    """Returns what puts back the tensors that hooks compute from parameters, which would hold on to the caller's."""
    before = [
        (vars(child), {name: value for name, value in vars(child).items() if isinstance(value, torch.Tensor)})
        for child in module.modules()
        if child._forward_pre_hooks
    ]

    def back() -> None:
        for place, values in before:
            place.update(values)

    return back


def _leads_back(replica: nn.Module, outputs: Sequence[torch.Tensor]) -> bool:
    """Whether a replica keeps what it returned: if that kept the replica in turn, neither would ever be freed."""
    ends = {tensor.grad_fn for tensor in outputs if tensor.grad_fn is not None}
    modules = frozenset(map(id, replica.modules()))
    return any(
        tensor.grad_fn in ends
        for child in replica.modules()
        for name, value in vars(child).items()
        if name not in ("_parameters", "_modules")
        for tensor, _ in tensors_from(value, known=modules)
    )
