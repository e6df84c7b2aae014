"""Whether a graph may be differentiated once more.

torch's own operations have derivatives of every order, or raise. Code that is not torch's (an autograd.Function, a C++
function, a hook, a compiled backward) can give a first derivative that is right and a second one that silently is not:
when its backward is @once_differentiable, leaves torch for numpy, or uses tensors that it hid on ctx, the part of the
second derivative that runs through it is missing. So v, the cotangent, requires grad in the first backward, and every
gradient that such a node returns must require grad as well; and, for order two, its kind must have been proven at load
(probe.py), since a hidden tensor leaves no trace.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from pullback_server.engine.guards import Witness
from pullback_server.engine.hosted import HostedModel
from pullback_server.faults import Fault
from pullback_wire import Reason

#: Nodes that once_differentiable leaves. They raise when a backward reaches them, but nothing leads on from them to
#: what is differentiated by, so none does. (NotImplemented, which torch puts where it lacks a formula, is reached.)
_ERRORS = ("Error", "DelayedError")
#: Backwards of torch.compile.
_COMPILED = "CompiledFunction"
#: Key of code that runs in a backward without being a node.
HOOK = "a hook"


def nodes(roots: Iterable[torch.Tensor | None], known: Collection[Any] = ()) -> Iterator[Any]:
    """Every node of the graphs behind some tensors, but for those that are known, and what is behind those alone."""
    seen: set[Any] = set(known)
    stack: list[Any] = [tensor.grad_fn for tensor in roots if tensor is not None and tensor.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            yield node
            stack.extend(following for following, _ in node.next_functions if following is not None)


def is_foreign(node: Any) -> bool:
    """Whether a node's backward is not one of torch's own derivatives."""
    return isinstance(node, torch.autograd.function.BackwardCFunction) or type(node).__name__ == "CppFunction"


def _nothing(*_: Any) -> None:
    pass


def has_hooks(node: Any) -> bool:
    """Whether hooks of the model's own hang on a node of the graph.

    A node does not list its hooks, but a handle of one knows the dictionary that holds them all.
    """
    for register in (node.register_hook, node.register_prehook):
        handle = register(_nothing)
        hooks = handle.hooks_dict_ref()
        count = 0 if hooks is None else len(hooks)
        handle.remove()
        if count > 1:
            return True
    return False


#: torch's own nodes whose second derivative is known to be wrong, and what to do about each.
_WRONG = {
    "WeightNormInterfaceBackward0": "torch._weight_norm has a wrong second derivative in torch itself; write it out as "
    "v * (g / torch.norm_except_dim(v, 2, dim)), or call it by its name in torch",
}


def wrong_twice(node: Any) -> str:
    """Why the second derivative of a node of torch's own is wrong, and what to do; empty: it is not known to be."""
    name = type(node).__name__
    if name.startswith("Embedding") and getattr(node, "_saved_scale_grad_by_freq", False):
        return "torch's embedding with scale_grad_by_freq has a wrong second derivative in torch itself; leave that out"
    return _WRONG.get(name, "")


def declared_wrong(hosted: HostedModel) -> str:
    """What the gate found of a model's second derivatives, and its operator declared of these; empty: nothing."""
    if hosted.probing or hosted.orders.reverse != 1:
        return ""
    return next((one.detail for one in hosted.checks if one.name == "second" and one.outcome == "declared"), "")


#: Nodes whose forward mode is not the adjoint of their backward where two values are equal.
_TIES = frozenset(f"{name}Backward0" for name in ("Fmax", "Fmin", "Maximum", "Minimum"))
#: What a node that has none says of its padding index: -1, as torch keeps it.
_NO_PADDING = (-1, (1 << 64) - 1)


def padding_of(node: Any) -> int | None:
    """The row of an embedding whose gradient is zero by definition."""
    index = getattr(node, "_saved_padding_idx", None) if type(node).__name__.startswith("Embedding") else None
    return None if index in _NO_PADDING else index


def lacks_adjoint(node: Any) -> bool:
    """Whether forward mode of a node of torch's own may be something else than the adjoint of its backward."""
    name = type(node).__name__
    if name.startswith("Embedding"):
        return padding_of(node) is not None or bool(getattr(node, "_saved_scale_grad_by_freq", False))
    return name in _TIES


def is_error(node: Any) -> bool:
    return type(node).__name__ in _ERRORS or node.name().rpartition("::")[2] in _ERRORS


def is_compiled(node: Any) -> bool:
    return _COMPILED in type(node).__name__


def key_of(node: Any) -> Any:
    """What foreign nodes of one kind have in common."""
    kinds = {str(meta.dtype) for meta in node._input_metadata}
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return node.name(), frozenset(kinds)
    # What a forward leaves on ctx tells which way it went: a Function may hide tensors only now and then.
    left = vars(node)
    flags = sorted(
        (name, repr(value)) for name, value in left.items() if isinstance(value, (bool, str, int, torch.dtype))
    )
    # So do the types of its numbers.
    kinds |= {str(value.dtype) for value in left.values() if isinstance(value, torch.Tensor)}
    kinds.update(_saved_kinds(node))
    return type(node), frozenset(left), tuple(flags), frozenset(kinds)


def _saved_kinds(node: Any) -> Iterator[str]:
    """The types of what a Function saved. What was packed is not unpacked for that."""
    try:
        for raw in node._raw_saved_tensors or ():
            if isinstance(raw.data, torch.Tensor):
                yield str(raw.data.dtype)
    # Freed, or changed in place: its backward will say so.
    except RuntimeError:
        return


def title(node: Any) -> str:
    """What the author of a node calls it."""
    forward = getattr(type(node), "_forward_cls", None)
    if forward is not None:
        return f"autograd.Function {forward.__qualname__}"
    return str(node.name())


def watcher(name: str, proven: bool, tripped: list[str]) -> Callable[..., None]:
    """A hook for a foreign node, which notes in `tripped` when the node drops a part of the graph.

    It knows nothing but the node's name: a closure over the node would be a cycle that holds the graph.
    """

    def look(gradients: Sequence[torch.Tensor | None], incoming: Sequence[torch.Tensor | None]) -> None:
        if not any(gradient is not None and gradient.requires_grad for gradient in incoming):
            return
        for gradient in gradients:
            if gradient is None:
                continue
            if not gradient.requires_grad:
                # A gradient that is constantly zero is right, where a probe found it so; but what comes of nothing but
                # zeros says nothing.
                zero = proven and not bool(gradient.count_nonzero())
                if not (zero and any(one is not None and bool(one.count_nonzero()) for one in incoming)):
                    tripped.append(
                        f"the backward of {name} returns a gradient that does not depend on the one it was given"
                    )
            elif gradient.grad_fn is not None and is_error(gradient.grad_fn):
                tripped.append(f"the backward of {name} is once_differentiable")

    return look


class Tripwire:
    """Watches one computation of a derivative that needs the graph of another one.

    proof: whether every foreign node must be of a proven kind (order two and more), or must just pass v on (the JVP by
    two backwards, which is linear in v).
    composed: whether a loss follows the model.
    """

    def __init__(
        self,
        hosted: HostedModel,
        outputs: Sequence[torch.Tensor],
        witness: Witness,
        *,
        hooked: bool,
        proof: bool,
        composed: bool,
    ) -> None:
        self._hosted = hosted
        self._proof = proof
        self._composed = composed
        self._tripped: list[str] = []
        self.foreign: list[Any] = []
        if proof and (why := declared_wrong(hosted)):
            raise self._fault(f"it is declared to be another one than that of its gradient: {why}")
        self._skewed = False
        on_nodes = False
        for node in nodes(outputs):
            on_nodes = on_nodes or has_hooks(node)
            why = wrong_twice(node)
            self._skewed |= bool(why)
            if proof and why:
                raise self._fault(why)
            if is_foreign(node):
                self._admit(node)
                self.foreign.append(node)
        self.hooks = witness.hooks or hooked or hosted.hooked or on_nodes
        if self.hooks:
            self._prove(HOOK, "a hook on a tensor or module")

    @property
    def clean(self) -> bool:
        """Whether the backward runs nothing but torch's own code, of which nothing is known to be wrong."""
        return not self.foreign and not self.hooks and not self._skewed

    def _admit(self, node: Any) -> None:
        if is_compiled(node):
            raise self._fault(
                f"its graph holds {title(node)}, a backward compiled by torch.compile, which has no derivative"
            )
        self._prove(key_of(node), title(node))

    def _prove(self, key: Any, name: str) -> None:
        hosted = self._hosted
        hosted.seen.add(key)
        if not self._proof or hosted.probing:
            return
        if key not in hosted.proven:
            raise self._fault(f"its backward runs {name}, whose own derivative is not proven: {hosted.orders.evidence}")
        if self._composed and not hosted.honest:
            raise self._fault(
                f"the backward of {name} is not the derivative of its forward, so that the loss, which depends on the "
                "forward, and its gradient have no common second derivative"
            )

    def _fault(self, why: str) -> Fault:
        return Fault(Reason.ORDER_UNAVAILABLE, f"{self._hosted.owner} has no derivative of this order: {why}")

    @contextmanager
    def armed(self) -> Iterator[None]:
        """Around the first backward, with create_graph and v requiring grad. Raises Fault (ORDER_UNAVAILABLE)."""
        handles = [node.register_hook(self._watch(node)) for node in self.foreign]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if self._tripped:
            raise self._fault(self._tripped[0])

    def _watch(self, node: Any) -> Any:
        return watcher(title(node), self._hosted.probing or key_of(node) in self._hosted.proven, self._tripped)

    def check_gradients(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """After the first backward: what its own graph is made of. Raises Fault (ORDER_UNAVAILABLE)."""
        for node in nodes(gradients):
            if is_error(node):
                raise self._fault(f"the graph of its gradient holds {title(node)}, which has no derivative")
            if is_foreign(node):
                self._admit(node)
