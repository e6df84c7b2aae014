"""Compiled plans: what torch.compile made of a model, for the shapes it was compiled for and for nothing else.

A compiled backward has no derivative, and code that meets what it was not compiled for is compiled anew, which takes
seconds. So a plan serves evaluations and first derivatives that are like one it was held against the model's own code
with (warming.py); for all others that code runs as it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

#: The inputs of a call, as far as compiled code depends on them.
Shapes = frozenset[tuple[str, torch.Size, torch.dtype]]


def shapes_of(inputs: Mapping[str, torch.Tensor]) -> Shapes | None:
    """None for inputs that no plan is made for."""
    if not all(tensor.is_contiguous() for tensor in inputs.values()):
        return None
    return frozenset((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items())


@dataclass
class Variant:
    """Code compiled for inputs of certain shapes, some of which require grad, and perhaps the parameters.

    requiring: what requires grad: "input:x", "param:weight". covers: what of that a call may differentiate by: what
    every differentiable output depends on. (Compiled code does not tell "depends on it" from "the gradient is 0".)
    """

    code: Callable[..., Any]
    requiring: frozenset[str]
    covers: frozenset[str]


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

    def find(self, inputs: Mapping[str, torch.Tensor], wanted: Collection[str]) -> Variant | None:
        """The variant that gives gradients by what is wanted, and by the least besides."""
        if self.suspect:
            return None
        shapes = shapes_of(inputs)
        fitting = [
            variant
            for variant in (self._variants.get(shapes, ()) if shapes is not None else ())
            if variant.covers.issuperset(wanted) and bool(variant.requiring) == bool(wanted)
        ]
        return min(fitting, key=lambda variant: len(variant.requiring), default=None)

    def run(self, variant: Variant, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """Raises whatever the code raises, and RuntimeError where it would have to be compiled anew."""
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
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
