"""TorchScript modules, run operation by operation: as torch's interpreter does on its own, without its optimiser.

From the second run on, torch's executor would replace parts of a graph by code of its own, chosen by what the first
runs were like: whose derivatives of inputs that take no part are zeros instead of none, whose forward mode loses
tangents, and which parameters that are exchanged may not suit. Its switch is one of the thread, and an executor that
has once optimised a graph goes on with that, so that every run of a module must go through here.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pullback_server.faults import listed
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.spec import Abilities, Registration

#: What optimize_for_inference and quantisation put into graphs, some of which cuts gradients without a word.
_FOR_INFERENCE = ("mkldnn", "prepacked::", "quantized::", "cudnn_convolution_relu", "cudnn_convolution_add_relu")
_FORWARD_MODE = "what a no_grad block of TorchScript cuts off, forward mode would go through"
_NOTE = (
    "What is served is the derivative of the TorchScript as it was saved: custom backwards (autograd.Function) and "
    "hooks of the original are not in it, nor, if it was traced, no_grad blocks."
)
_ALWAYS_TRAINS = "Its {} run in train mode whatever a call asks for: it was traced in that mode, or written so."
#: Arguments of operations by which they know that they run in train mode, which a trace makes constants.
_TRAIN = ("train", "training", "use_input_stats")


class Scripted(nn.Module):
    """A TorchScript module with a signature, and with its parameters, buffers and modules as its own."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        own = vars(self)
        # In a dictionary of its own: as an attribute it would be a module inside, whose names begin with its own.
        own["_held"] = {"module": module}
        for registry in ("_parameters", "_buffers", "_modules"):
            own[registry] = getattr(module, registry)
        own["training"] = module.training

        def forward(*arguments: Any, **keywords: Any) -> Any:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                return module(*arguments, **keywords)

        forward.__signature__ = _signature(module)  # type: ignore[attr-defined]
        own["forward"] = forward

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "training":
            vars(self)["_held"]["module"].training = value

    def kinds(self) -> set[str]:
        """The operations that it is made of."""
        return _kinds(vars(self)["_held"]["module"])

    def __deepcopy__(self, memo: dict[int, Any]) -> Scripted:
        return Scripted(copy.deepcopy(vars(self)["_held"]["module"], memo))


def _signature(module: Any) -> inspect.Signature:
    parameters = []
    for argument in module.forward.schema.arguments[1:]:
        default = argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        # The engine takes arguments for tensors unless they are annotated otherwise, whatever otherwise is.
        annotation = inspect.Parameter.empty if _is_tensor(argument.type) else int
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(argument.name, kind, default=default, annotation=annotation))
    return inspect.Signature(parameters)


def _is_tensor(kind: Any) -> bool:
    if kind.kind() == "OptionalType":
        kind = kind.getElementType()
    return bool(kind.kind() == "TensorType")


@dataclass(frozen=True)
class _Factory:
    path: Path
    owner: str
    device: torch.device

    def __call__(self) -> nn.Module:
        return Scripted(_load(self.path, self.owner, self.device))


def load_scripted(name: str, path: Path, owner: str, device: torch.device) -> Registration:
    """The registration of a TorchScript file, and what it cannot do.

    Raises LoadError for what is no such file, and for modules whose gradients could be wrong or missing.
    """
    module = _load(path, owner, device)
    where = f"{owner}: {path.name}"
    _check(module, where)
    shared = _shared(module)
    eval_only, train_only = _fixed(module, False), _fixed(module, True)
    return Registration(
        name,
        _Factory(path, owner, device),
        kind="factory",
        source="torchscript",
        abilities=Abilities(
            train=f"it was traced in eval mode, in which its {listed(eval_only)} stay" if eval_only else "",
            parameters=shared,
            forward_mode=_FORWARD_MODE,
            notes=(_NOTE, *([_ALWAYS_TRAINS.format(listed(train_only))] if train_only else [])),
        ),
    )


def _load(path: Path, owner: str, device: torch.device) -> Any:
    where = f"{owner}: {path.name}"
    if not path.is_file():
        raise LoadError(f"{where}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location=device)  # type: ignore[no-untyped-call]
    # Archives, code and operators have errors of many kinds.
    except Exception as error:
        raise LoadError(f"{where}: torch.jit cannot load it: {type(error).__name__}: {error}") from error


def _check(module: Any, where: str) -> None:
    if not hasattr(module, "forward"):
        raise LoadError(f"{where}: it has no forward")
    if not hasattr(module, "training"):
        raise LoadError(
            f"{where}: it was frozen (torch.jit.freeze), which removes detach(), so that its gradients could be others "
            "than the model's; save it as torch.jit.script returns it"
        )
    for argument in module.forward.schema.arguments[1:]:
        if not _is_tensor(argument.type) and not argument.has_default_value():
            raise LoadError(
                f"{where}: its argument {argument.name!r} is {argument.type.annotation_str}, expected a tensor; "
                "wrap the module in one that takes tensors only"
            )
    kinds = _kinds(module)
    found = sorted(kind for kind in kinds if any(part in kind.lower() for part in _FOR_INFERENCE))
    if found:
        raise LoadError(
            f"{where}: it was made for inference alone (torch.jit.optimize_for_inference, quantisation): "
            f"{listed(found)} do not pass gradients on; save it as torch.jit.script returns it"
        )
    if changed := _changed(module):
        raise LoadError(
            f"{where}: running it changes its {listed(changed)}, which would lead from one caller to the next; keep "
            "what changes in buffers, or take it as an input and return it"
        )
    if "prim::fork" in kinds:
        raise LoadError(
            f"{where}: it runs parts of itself in other threads (torch.jit.fork), where its execution cannot be kept "
            "to what has right derivatives"
        )


def _kinds(module: Any) -> set[str]:
    # A node is one only as long as its graph is held.
    graph = module.inlined_graph
    return {node.kind() for node in _nodes(graph)}


def _fixed(module: Any, train: bool) -> list[str]:
    """The operations that are in one mode, whatever the module's, and would be others in the other mode."""
    graph = module.inlined_graph
    found = set()
    for node in _nodes(graph):
        if not node.kind().startswith("aten::") or node.schema() == "(no schema)":
            continue
        arguments = torch._C.parse_schema(node.schema()).arguments
        given: dict[str, Any] = {
            argument.name: value.toIValue() if value.node().kind() == "prim::Constant" else value
            for argument, value in zip(arguments, node.inputs(), strict=False)
        }
        flag = next((given[name] for name in _TRAIN if name in given), None)
        # Dropout with a chance of 0 is nothing, and normalisation that keeps no statistics has one mode.
        chance = given.get("p", given.get("dropout"))
        same = (isinstance(chance, float) and chance == 0) or ("running_mean" in given and not given["running_mean"])
        if flag is train and not same:
            found.add(node.kind().removeprefix("aten::"))
    return sorted(found)


def _changed(module: Any) -> list[str]:
    """The attributes, other than buffers, that its forward assigns to."""
    buffers = {name.rpartition(".")[2] for name, _ in module.named_buffers()}
    graph = module.inlined_graph
    found = set()
    for node in _nodes(graph):
        # A no_grad block is an object as well, which remembers the mode before.
        if node.kind() == "prim::SetAttr" and "grad_mode" not in str(next(iter(node.inputs())).type()):
            found.add(node.s("name"))
    return sorted(found - buffers)


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _shared(module: Any) -> str:
    """Why no parameter can be given: attributes that lie in the memory of one would not be exchanged with it."""
    looked: Any = torch._C
    attributes: list[tuple[str, Any]] = looked._jit_debug_module_iterators(module._c)["named_attributes_r"]
    parameters = {tensor.untyped_storage()._cdata: name for name, tensor in module.named_parameters()}
    names = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    for name, value in attributes:
        if name in names:
            continue
        for tensor in _tensors_in(value):
            parameter = parameters.get(tensor.untyped_storage()._cdata)
            if parameter is not None:
                return (
                    f"it keeps its parameter {parameter!r} in {name!r} as well, where nothing else can take its place"
                )
    return ""


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors_in(one)
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors_in(one)
