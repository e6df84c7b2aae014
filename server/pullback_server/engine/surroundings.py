"""What the code of a model may change for all others in its process, and how it is put back.

Settings of torch, Python and numpy are put back. Where they decide what numbers come out (the default dtype or device),
or where functions and classes of torch were replaced, the model is refused as well: served without its changes it would
not be the model that its author has run. Packages that it imports may replace what they like, as far as other models
compute what they did before (see `bystanders`).
"""

from __future__ import annotations

import builtins
import contextlib
import math
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from pullback_server.engine import operators
from pullback_server.faults import listed
from pullback_server.hosting.loading import LoadError

Switch = tuple[str, Callable[[], Any], Callable[[Any], Any]]


def _attribute(holder: Any, name: str, title: str = "") -> Switch:
    return title, lambda: getattr(holder, name, None), lambda value: setattr(holder, name, value)


def _set_path(before: list[str]) -> None:
    # What was added is looked at last, so that nobody else's imports find other modules.
    sys.path[:] = before + [entry for entry in sys.path if entry not in before]


def _set_environment(before: dict[str, str]) -> None:
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


def _set_signals(before: dict[int, Any]) -> None:
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            if handler is not None and signal.getsignal(number) is not handler:
                signal.signal(number, handler)


def _modes() -> tuple[int, object]:
    default: Any = torch._GLOBAL_DEVICE_CONTEXT
    context = getattr(default, "device_context", None)
    return int(torch._C._len_torch_function_stack()), None if context is None else context.device


def _set_modes(before: tuple[int, object]) -> None:
    torch.set_default_device(before[1])  # type: ignore[arg-type]
    while _modes()[0] > before[0]:
        torch._C._pop_torch_function_stack()


def _get_deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


def _set_deterministic(before: tuple[bool, bool]) -> None:
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _set_filters(before: list[Any]) -> None:
    filters: Any = warnings.filters
    filters[:] = before


_cuda: Any = torch.backends.cuda
_cudnn: Any = torch.backends.cudnn
_set_mkldnn: Any = torch.backends.mkldnn.set_flags
#: Titles are of those for which a model is refused: its numbers would be others.
_SWITCHES: tuple[Switch, ...] = (
    ("torch.set_default_dtype", torch.get_default_dtype, torch.set_default_dtype),
    ("torch.set_default_device, or another mode that it entered", _modes, _set_modes),
    ("", torch.is_grad_enabled, torch._C._set_grad_enabled),
    ("", torch.is_anomaly_enabled, torch.set_anomaly_enabled),
    ("", lambda: torch.is_autocast_enabled("cpu"), lambda on: torch.set_autocast_enabled("cpu", on)),
    ("", lambda: torch.is_autocast_enabled("cuda"), lambda on: torch.set_autocast_enabled("cuda", on)),
    ("", torch.get_num_threads, torch.set_num_threads),
    ("", _get_deterministic, _set_deterministic),
    _attribute(torch.backends, "fp32_precision"),
    _attribute(_cuda.matmul, "fp32_precision"),
    _attribute(_cudnn.conv, "fp32_precision"),
    _attribute(_cudnn.rnn, "fp32_precision"),
    ("", torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    *(_attribute(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic", "allow_tf32")),
    _attribute(torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction"),
    _attribute(torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction"),
    ("", _cuda.flash_sdp_enabled, _cuda.enable_flash_sdp),
    ("", _cuda.mem_efficient_sdp_enabled, _cuda.enable_mem_efficient_sdp),
    ("", _cuda.cudnn_sdp_enabled, _cuda.enable_cudnn_sdp),
    ("", _cuda.math_sdp_enabled, _cuda.enable_math_sdp),
    ("", lambda: torch.backends.mkldnn.enabled, lambda on: _set_mkldnn(on)),
    ("", np.geterr, lambda state: np.seterr(**state)),
    ("", lambda: np.random.get_state(legacy=True)[1].tobytes(), lambda _: np.random.seed()),  # type: ignore[index]
    ("", random.getstate, random.setstate),
    ("", os.getcwd, os.chdir),
    ("", lambda: dict(os.environ), _set_environment),
    ("", lambda: list(sys.path), _set_path),
    ("", lambda: list(warnings.filters), _set_filters),
    ("", lambda: {number: signal.getsignal(number) for number in signal.valid_signals()}, _set_signals),
    _attribute(threading, "excepthook"),
    _attribute(sys, "excepthook"),
)


def _spaces() -> list[Any]:
    """Where torch keeps what every model uses."""
    found: list[Any] = [
        torch,
        nn,
        nn.functional,
        nn.init,
        torch.autograd,
        torch.autograd.function,
        torch.linalg,
        torch.special,
    ]
    found += [torch.fft, torch._C, torch._C._nn, torch.Tensor, torch._C.TensorBase, torch.autograd.Function]
    found += [builtins, math, np, *(kind for kind in vars(nn).values() if isinstance(kind, type))]
    return found


def _global_hooks() -> list[dict[Any, Any]]:
    module: Any = nn.modules.module
    return [value for name, value in vars(module).items() if name.startswith("_global_") and isinstance(value, dict)]


#: What Python itself puts into classes.
_NOTES = {"__annotations__", "__doc__", "__slotnames__", "__parameters__", "__warningregistry__", "__abstractmethods__"}


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    # Some settings of torch cannot be read after the same was said by another one of them.
    except RuntimeError:
        return _read


class Surroundings:
    """The state of the process at one time."""

    def __init__(self) -> None:
        self._settings = [_read(get) for _, get, _ in _SWITCHES]
        self._spaces = [(space, dict(vars(space))) for space in _spaces()]
        self._hooks = [(hooks, dict(hooks)) for hooks in _global_hooks()]

    def restore(self) -> list[str]:
        """Puts the settings back; tells which of those were others that decide about numbers."""
        found = []
        for (title, get, set_), before in zip(_SWITCHES, self._settings, strict=True):
            if _read(get) != before:
                set_(before)
                found += [title] if title else []
        return found

    def unpatch(self, *, all: bool) -> list[str]:
        """Puts back what was replaced in torch: by a model's own code, or by anybody. Tells what it was."""
        found = []
        known = {id(value) for _, before in self._spaces for value in before.values()}
        for space, before in self._spaces:
            now = vars(space)
            # What a class has from its bases is replaced where it is given one of its own.
            changed = [name for name, value in before.items() if now.get(name, self) is not value]
            changed += [
                name
                for name in now.keys() - before.keys()
                if isinstance(space, type) and any(name in vars(base) for base in space.__mro__[1:])
            ]
            for name in set(changed) - _NOTES:
                value = now.get(name)
                if all or id(value) in known or _of_a_model(value):
                    found.append(f"{space.__name__}.{name}")
                    if name in before:
                        setattr(space, name, before[name])
                    else:
                        delattr(space, name)
        for hooks, before in self._hooks:
            for key in hooks.keys() - before.keys():
                if all or _of_a_model(hooks[key]):
                    found.append("the hooks of all modules")
                    del hooks[key]
        return list(dict.fromkeys(found))


def _of_a_model(value: Any) -> bool:
    """Whether the code of a model has made this, or nobody knows who."""
    for _ in range(8):
        inner = getattr(value, "func", None) or getattr(value, "__func__", None) or getattr(value, "fget", None)
        if inner is None:
            break
        value = inner
    names = getattr(value, "__globals__", None)
    if names is not None:
        module = names.get("__name__", "")
    elif isinstance(value, type):
        module = value.__module__
    else:
        module = type(value).__module__
    return not module or module == "builtins" or str(module).startswith(operators.OWNERS)


@contextlib.contextmanager
def kept(owner: str) -> Iterator[Surroundings]:
    """Around code of a model: afterwards the process is as it was. Raises LoadError where a model must not do that."""
    before = Surroundings()
    settings, patched = [], []
    try:
        yield before
    finally:
        settings, patched = before.restore(), before.unpatch(all=False)
    if patched:
        raise LoadError(
            f"{owner}: its code replaces {listed(patched)}, for every other model in the process as well; call "
            "functions and classes of its own instead"
        )
    if settings:
        raise LoadError(
            f"{owner}: its code calls {listed(settings)}, for every other model in the process as well; give tensors "
            "and modules their dtype and device where they are made (dtype=..., .double())"
        )
