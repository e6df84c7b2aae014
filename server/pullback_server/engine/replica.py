"""A hosted module with other parameters or buffers in it, for one call whose graph may outlive many others.

A backward may run modules again (torch.utils.checkpoint, a Function that calls one) and must find them as the forward
did. Most models do not: their graphs hold tensors only, and it is enough to exchange what the hosted module holds
until its forward has run. Whether a graph holds on to modules shows in their reference counts; a model whose graph does
runs on a copy of its modules that is that graph's own.
"""

from __future__ import annotations

import copy
import enum
import gc
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from pullback_server.engine.call import Again, out_of_memory, text_of
from pullback_server.engine.hosted import HostedModel
from pullback_server.faults import Fault
from pullback_wire import Reason

Code = Callable[..., Any]

_PLAIN_VALUES = (
    *(int, float, complex, str, bytes, type(None), enum.Enum, type, types.BuiltinFunctionType),
    *(torch.dtype, torch.device, torch.Tensor),
)
_OWN = frozenset(vars(nn.Module()))


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


def _is_plain(value: Any) -> bool:
    """Whether an attribute surely leads to no module."""
    if isinstance(value, _PLAIN_VALUES):
        return True
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    if isinstance(value, (tuple, list, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, dict) and all(map(_is_plain, value.values()))


def _is_open(module: nn.Module) -> bool:
    """Whether everything that a module's code can reach through it are plain values and its submodules."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    if type(module).__module__.startswith("torch.nn.modules."):
        return "forward" not in vars(module)
    return all(_is_plain(value) for name, value in vars(module).items() if name not in _OWN)


class Stage:
    """Where a call of a model runs.

    swaps: what stands for parameters, by name. train: train mode. private: buffers of its own.
    """

    def __init__(self, hosted: HostedModel, swaps: Mapping[str, torch.Tensor], train: bool) -> None:
        self._hosted = hosted
        self._swaps = swaps
        self._train = train and hosted.module is not None
        self._private = hosted.module is not None and (train or hosted.writes_buffers)
        self._counts: list[int] | None = None

    @property
    def changes(self) -> bool:
        """Whether the module must be other than it stands."""
        return bool(self._swaps) or self._private or self._train

    @contextmanager
    def code(self) -> Iterator[Code]:
        """What to call, for as long as the forward runs. Raises Fault (UNSUPPORTED_BY_MODEL)."""
        hosted = self._hosted
        module = hosted.module
        if not self.changes or module is None:
            yield hosted.code
        elif hosted.stock or self._exchangeable(module):
            with self._exchanged(module):
                yield hosted.code
        else:
            replica = self._replica(module)
            with self._trapped(module):
                yield replica

    def _exchangeable(self, module: nn.Module) -> bool:
        if not self._hosted.recomputes and not all(map(_is_open, module.modules())):
            self._hosted.recomputes = True
        return not self._hosted.recomputes

    @contextmanager
    def _exchanged(self, module: nn.Module) -> Iterator[None]:
        hosted = self._hosted
        undo = [hosted.swap(self._swaps, self._private)]
        if not hosted.stock:
            self._counts = list(map(sys.getrefcount, module.modules()))
        collecting = gc.isenabled()
        try:
            if self._train:
                undo.append(hosted.enter_training())
            # What is collected meanwhile would make counts fall.
            gc.disable()
            yield
        finally:
            if collecting:
                gc.enable()
            while undo:
                undo.pop()()

    def check(self) -> None:
        """With the forward's graph alive: whether that holds on to modules. Raises Again, having learned it."""
        module, counts, self._counts = self._hosted.module, self._counts, None
        if counts is None or module is None:
            return
        if any(now > before for now, before in zip(map(sys.getrefcount, module.modules()), counts, strict=True)):
            self._hosted.recomputes = True
            raise Again

    def _replica(self, module: nn.Module) -> nn.Module:
        hosted = self._hosted
        # Sessions run code that torch.compile was applied to as it was written.
        while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
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
            raise self._unsupported(f"it cannot be copied: {type(error).__name__}: {text_of(error)}") from error
        if self._train:
            replica.train()
        return replica

    @contextmanager
    def _trapped(self, module: nn.Module) -> Iterator[None]:
        """While a replica runs, nothing else of the model may."""
        hosted = self._hosted
        originals = set(map(id, module.modules()))
        captured = False

        def look(called: nn.Module, _: Any) -> None:
            nonlocal captured
            if id(called) in originals:
                captured = True
                raise _Captured

        undo = hosted.swap(dict.fromkeys(self._swaps, _TRAP), False)
        handle = nn.modules.module.register_module_forward_pre_hook(look)
        try:
            yield
        except BaseException as error:
            captured = captured or isinstance(error, _Captured)
            if not captured:
                raise
        finally:
            handle.remove()
            undo()
        if captured:
            raise self._unsupported(
                "its code reaches modules other than through the module that it is part of (a closure, a global name)"
            )

    def _unsupported(self, why: str) -> Fault:
        return Fault(
            Reason.UNSUPPORTED_BY_MODEL,
            f"{self._hosted.owner} can be given no parameters and no train mode in a session: {why}",
        )
