"""Compiled plans: what torch.compile made of a model, for the shapes it was compiled for and for nothing else.

A compiled backward has no derivative, and code that meets what it was not compiled for is compiled anew, which takes
seconds. So a plan serves evaluations and first derivatives that are like one it was held against the model's own code
with (warming.py); for all others that code runs as it is written.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

#: The inputs of a call, as far as compiled code depends on them.
Shapes = frozenset[tuple[str, torch.Size, torch.dtype]]

_numbers = itertools.count()


def shapes_of(inputs: Mapping[str, torch.Tensor]) -> Shapes:
    return frozenset((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())


@dataclass
class Variant:
    """Code compiled for inputs of certain shapes, some of which require grad, and perhaps the parameters.

    requiring: what requires grad: "input:x", "param:weight". reach: for each of them the outputs that depend on it, and
    under "" all that can be differentiated.
    """

    code: Callable[..., Any]
    requiring: frozenset[str]
    reach: Mapping[str, frozenset[str]]

    def serves(self, wanted: Collection[str], pulled: Collection[str] | None) -> bool:
        """Whether it can stand for the model's code in a call that differentiates `pulled` by what is wanted.

        pulled: names of outputs; None: it may be any of them. Compiled code gives a gradient of zero where nothing
        depends on an input, and callers are told the one from the other. A compiled backward takes outputs that are
        not pulled for pulled by zero, of which the model's own backward, not run at all, need not make zero.
        """
        if not self.requiring.issuperset(wanted) or bool(self.requiring) != bool(wanted):
            return False
        every = self.reach[""]
        if pulled is None:
            return not wanted or (len(every) <= 1 and all(self.reach[label] == every for label in wanted))
        return not wanted or (
            every.issubset(pulled) and all(not self.reach[label].isdisjoint(pulled) for label in wanted)
        )


@dataclass
class Plan:
    """The compiled variants of one model.

    graphs: whether they run as CUDA graphs, whose results lie in memory that the next run writes to.
    warming: while the variants are compiled and tried: what they raise is raised, and compiling is allowed.
    """

    graphs: bool
    warming: bool = False
    #: Why the latest variant that ran may be of no use; the call is being computed without it, to see.
    suspect: str = ""
    _variants: dict[Shapes, list[Variant]] = field(default_factory=dict)

    def add(self, shapes: Shapes, variant: Variant) -> None:
        self._variants.setdefault(shapes, []).append(variant)

    def find(
        self, inputs: Mapping[str, torch.Tensor], wanted: Collection[str], pulled: Collection[str] | None
    ) -> Variant | None:
        """The variant that gives gradients by what is wanted, and by the least besides. See `Variant.serves`."""
        if self.suspect or not all(tensor.is_contiguous() for tensor in inputs.values()):
            return None
        fitting = [one for one in self._variants.get(shapes_of(inputs), ()) if one.serves(wanted, pulled)]
        return min(fitting, key=lambda variant: len(variant.requiring), default=None)

    def run(self, variant: Variant, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Raises whatever the code raises, and RuntimeError where it would have to be compiled anew."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if self.warming:
            return variant.code(*arguments, **keywords)
        with torch.compiler.set_stance("fail_on_recompile"):
            return variant.code(*arguments, **keywords)

    def kept(
        self, outputs: dict[str, torch.Tensor], stand: Sequence[torch.Tensor]
    ) -> tuple[dict[str, torch.Tensor], list[Callable[[], None]]]:
        """The outputs, in memory that no later run writes to; and what undoes that gradients will be as well.

        stand: what will be differentiated by.
        """
        if not self.graphs:
            return outputs, []
        # Hooks, for the gradients do not exist yet; they do not change what torch.compile guards on during a run.
        handles = [tensor.register_hook(torch.clone) for tensor in stand if tensor.requires_grad]  # type: ignore[no-untyped-call]
        return {name: tensor.clone() for name, tensor in outputs.items()}, [handle.remove for handle in handles]


def compiled(code: Callable[..., Any], graphs: bool) -> Callable[..., Any]:
    """`code`, compiled apart from whatever else is: torch keeps what it compiled by code object."""

    def run(*arguments: Any, **keywords: Any) -> Any:
        return code(*arguments, **keywords)

    name = f"run_{next(_numbers)}"
    own = types.FunctionType(run.__code__.replace(co_name=name), run.__globals__, name, None, run.__closure__)
    # A break of the graph could be one that depends on data, and so would be what runs after it.
    made: Callable[..., Any] = torch.compile(
        own, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None
    )
    return made


@contextmanager
def compiling() -> Iterator[None]:
    """The compiler's settings."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    with ExitStack() as stack:
        # Else each worker keeps a process for each core.
        stack.enter_context(inductor.patch(compile_threads=1))
        if hasattr(functorch, "backward_pass_autocast"):
            # A backward runs outside of the autocast that its forward ran in.
            stack.enter_context(functorch.patch(backward_pass_autocast="off"))
        yield
