"""Contexts of a call: what is global to the process, and what torch must be told for derivatives to exist."""

from __future__ import annotations

import contextlib
import functools
import random
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

#: Whether Python's and numpy's generators still stand where a seeded call left them.
_seeded_foreign = False


@functools.cache
def _generators(device: torch.device) -> tuple[torch.Generator, ...]:
    if device.type != "cuda":
        return (torch.default_generator,)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.default_generator, torch.cuda.default_generators[index]


def generator_states(device: torch.device, foreign: bool = True) -> list[object]:
    """Where all generators stand that a call may draw from. foreign: also Python's and numpy's."""
    states: list[object] = [generator.get_state().numpy().tobytes() for generator in _generators(device)]
    if foreign:
        name, keys, *rest = np.random.get_state(legacy=True)
        states += [random.getstate(), name, bytes(keys), rest]  # type: ignore[arg-type]
    return states


class Randomness:
    """Every random number a call draws: torch's on the CPU and the device, Python's and numpy's.

    With a seed each forward begins at that seed, and afterwards torch's generators are where they were. Without one
    the generators go on as they are; a model that seeds them itself does not decide about the calls after it.
    (torch.manual_seed and fork_rng do the same in 100 times the time: they walk the stack.)
    """

    def __init__(self, seed: int | None, device: torch.device, foreign: bool = True) -> None:
        """foreign: whether the model may draw from Python's and numpy's generators."""
        self._seed = seed
        self._foreign = foreign
        self._generators = _generators(device)

    def begin(self) -> None:
        """Before a call."""
        global _seeded_foreign
        if self._seed is not None:
            self._states = [generator.get_state() for generator in self._generators]
            return
        if _seeded_foreign:
            random.seed()
            np.random.seed()
            _seeded_foreign = False
        self._initial = [generator.initial_seed() for generator in self._generators]

    def restart(self) -> None:
        """Before every forward."""
        global _seeded_foreign
        if self._seed is not None:
            for generator in self._generators:
                generator.manual_seed(self._seed)
            if not self._foreign:
                return
            random.seed(self._seed)
            np.random.seed((self._seed ^ (self._seed >> 32)) & 0xFFFFFFFF)
            _seeded_foreign = True

    def end(self) -> None:
        """After a call."""
        if self._seed is not None:
            for generator, state in zip(self._generators, self._states, strict=True):
                generator.set_state(state)
        else:
            for generator, initial in zip(self._generators, self._initial, strict=True):
                if generator.initial_seed() != initial:
                    generator.seed()


def rewinding(device: torch.device, foreign: bool = True) -> Callable[[], None]:
    """Returns what puts every generator that a call may draw from back to where it is now."""
    global _seeded_foreign
    if foreign and _seeded_foreign:
        # As the call would do, whose numbers could not be drawn again.
        random.seed()
        np.random.seed()
        _seeded_foreign = False
    states = [(generator, generator.get_state()) for generator in _generators(device)]
    others = (random.getstate(), np.random.get_state(legacy=True)) if foreign else None

    def rewind() -> None:
        global _seeded_foreign
        for generator, state in states:
            generator.set_state(state)
        if others is not None:
            random.setstate(others[0])
            np.random.set_state(others[1])
            _seeded_foreign = False

    return rewind


#: An operator without a derivative contributes a gradient of zero, of which torch only warns.
_NO_KERNEL: Any = (
    "error",
    re.compile(r".*an autograd kernel was not registered to the Autograd key", re.DOTALL),
    Warning,
    None,
    0,
)


class Ambience:
    """Puts back what user code may have changed for the whole process: grad mode, default dtype, autocast."""

    def __enter__(self) -> None:
        if _NO_KERNEL not in warnings.filters:
            warnings.filters.insert(0, _NO_KERNEL)  # type: ignore[attr-defined]
        self._grad = torch.is_grad_enabled()
        self._dtype = torch.get_default_dtype()
        self._autocast = torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        self._fastpath = torch.backends.mha.get_fastpath_enabled()
        # The encoder's fast path computes other values at padded places, and has no derivatives: never mix the two.
        torch.backends.mha.set_fastpath_enabled(False)
        torch._C._set_grad_enabled(True)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._grad)
        torch.backends.mha.set_fastpath_enabled(self._fastpath)
        if torch.get_default_dtype() != self._dtype:
            torch.set_default_dtype(self._dtype)
        for device, enabled in zip(("cpu", "cuda"), self._autocast, strict=True):
            if torch.is_autocast_enabled(device) != enabled:
                torch.set_autocast_enabled(device, enabled)


@contextmanager
def without_cudnn() -> Iterator[None]:
    """cuDNN off. Not torch.backends.cudnn.flags, which sets everything else to defaults."""
    enabled = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = enabled


def _weight_norm(v: torch.Tensor, g: torch.Tensor, dim: int = 0) -> torch.Tensor:
    """torch._weight_norm as it is defined: the fused one's backward has a wrong derivative (torch 2.13 and before)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _PlainKernels:
    """torch.nn.attention.sdpa_kernel(MATH) in a tenth of its time, compiled code off, and weight norm written out."""

    _GET: tuple[Callable[[], bool], ...] = (
        torch._C._get_flash_sdp_enabled,
        torch._C._get_mem_efficient_sdp_enabled,
        torch._C._get_cudnn_sdp_enabled,
        torch._C._get_overrideable_sdp_enabled,
        torch._C._get_math_sdp_enabled,
    )
    _SET: tuple[Callable[[bool], None], ...] = (
        torch._C._set_sdp_use_flash,
        torch._C._set_sdp_use_mem_efficient,
        torch._C._set_sdp_use_cudnn,
        torch._C._set_sdp_use_overrideable,
        torch._C._set_sdp_use_math,
    )

    def __enter__(self) -> None:
        self._compiled = compiled_code_as_written() if "torch._dynamo" in sys.modules else None
        if self._compiled is not None:
            self._compiled.__enter__()
        self._before = [enabled() for enabled in self._GET]
        for switch, wanted in zip(self._SET, (False, False, False, False, True), strict=True):
            switch(wanted)
        # The module, which a function of the same name hides, has a name of its own for it.
        self._places = [torch, sys.modules["torch.nn.utils.weight_norm"]]
        self._fused = [place._weight_norm for place in self._places]
        for place in self._places:
            place._weight_norm = _weight_norm  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        for place, fused in zip(self._places, self._fused, strict=True):
            place._weight_norm = fused  # type: ignore[attr-defined]
        for switch, wanted in zip(self._SET, self._before, strict=True):
            switch(wanted)
        if self._compiled is not None:
            self._compiled.__exit__(None, None, None)


def plain_kernels() -> contextlib.AbstractContextManager[None]:
    """The kernels that have derivatives of every order, in forward mode too.

    Attention by plain matrix products; code compiled by torch.compile runs as it was written, for a compiled backward
    can neither be differentiated nor vectorised.
    """
    return _PlainKernels()


@contextmanager
def compiled_code_as_written() -> Iterator[None]:
    """torch.compile does nothing for a while."""
    # Nothing can be compiled where dynamo was never imported, and importing it takes a second.
    if "torch._dynamo" in sys.modules:
        with torch.compiler.set_stance("force_eager"):
            yield
    else:
        yield


@contextmanager
def quiet_vmap() -> Iterator[None]:
    """vmap warns of operators that it has to loop over; whoever calls the server can do nothing about that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")
        yield


class Witness:
    """Sees what a forward does that the graph does not show.

    hooks: Tensor.register_hook was called, so the backward runs code of the model's own.
    cuts: gradients were cut, or a backward was run, in a way that reverse mode takes as constant and forward mode would
    differentiate through (torch.no_grad, torch.autograd.grad inside the model).
    """

    def __init__(self) -> None:
        self.hooks = False
        self.cuts = False

    @contextmanager
    def watching(self) -> Iterator[Witness]:
        def hook(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.hooks = True
            return register_hook(tensor, *args, **kwargs)

        def grad_mode(enabled: bool) -> None:
            self.cuts |= not enabled
            set_grad_enabled(enabled)

        def engine(*args: Any, **kwargs: Any) -> Any:
            self.cuts = True
            return run_backward(*args, **kwargs)

        register_hook: Callable[..., Any] = torch.Tensor.register_hook
        set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled
        run_backward: Callable[..., Any] = torch.autograd._engine_run_backward  # type: ignore[attr-defined]
        torch.Tensor.register_hook = hook  # type: ignore[method-assign, assignment]
        torch._C._set_grad_enabled = grad_mode
        torch.autograd._engine_run_backward = engine  # type: ignore[attr-defined]
        try:
            yield self
        finally:
            torch.Tensor.register_hook = register_hook  # type: ignore[method-assign]
            torch._C._set_grad_enabled = set_grad_enabled  # type: ignore[assignment]
            torch.autograd._engine_run_backward = run_backward  # type: ignore[attr-defined]
