"""Models that torch.export saved: graphs of torch's operations, without the Python code that they came from."""

from __future__ import annotations

import inspect
import json
import operator
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument
from torch.export.passes import move_to_device_pass
from torch.fx import GraphModule

from pullback_server.engine._dtypes import name_of
from pullback_server.hosting.loading import LoadError
from pullback_server.hosting.spec import Abilities, Registration, TensorSpec

#: The file that engine/exporting.py adds to an archive.
EXTRA = "pullback.json"
#: Arguments of operations by which they know that they run in train mode.
_TRAIN = ("train", "training", "use_input_stats")
#: What a graph is called that still has what autograd needs; others were rewritten for inference.
_TRAINING = "TRAINING"


@dataclass
class _Once:
    """A factory that first gives what was loaded to look at it, and then loads anew."""

    path: Path
    owner: str
    device: torch.device
    first: nn.Module | None

    def __call__(self) -> nn.Module:
        module, self.first = self.first, None
        if module is None:
            program, ties, _ = _load(self.path, self.owner, self.device)
            module = _module(program, ties)
        return module


def load_exported(name: str, path: Path, owner: str, device: torch.device) -> Registration:
    """The registration of a .pt2 file: its inputs with the shapes it was exported for, and what it cannot do.

    Raises LoadError for what is no such file, and for programs whose derivatives would not be the model's.
    """
    program, ties, told = _load(path, owner, device)
    where = f"{owner}: {path.name}"
    _check_kind(program, where)
    inputs = _inputs(program, where)
    first = _module(program, ties)
    for key, one in told.get("inputs", {}).items():
        if key in inputs:
            # The names of its free extents, and bounds, are not in the graph.
            inputs[key] = TensorSpec(inputs[key].dtype, tuple(one["shape"]), one["low"], one["high"])
    return Registration(
        name,
        _Once(path, owner, device, first),
        kind="factory",
        inputs=inputs,
        source="pt2",
        abilities=Abilities(train=_mode(program, told), notes=_notes(told)),
        batch_axis=told.get("batch_axis"),
        outputs=tuple(told["outputs"]) if told.get("outputs") else None,
    )


def _load(path: Path, owner: str, device: torch.device) -> tuple[ExportedProgram, dict[str, str], dict[str, Any]]:
    """The program, on its device; its ties; and what our exporter said of it (nothing: empty). Raises LoadError."""
    where = f"{owner}: {path.name}"
    if not path.is_file():
        raise LoadError(f"{where}: no such file")
    extra: dict[str, Any] = {EXTRA: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.load(path, extra_files=extra)
            ties = _ties(program)
            if device.type != "cpu" or _devices(program) - {"cpu"}:
                # Graphs name the device of what they create.
                program = move_to_device_pass(program, str(device))
    # It is a zip of JSON, pickles and graphs, each with errors of its own.
    except Exception as error:
        raise LoadError(f"{where}: torch.export cannot load it: {type(error).__name__}: {error}") from error
    told = extra[EXTRA]
    try:
        return program, ties, json.loads(told) if told else {}
    except ValueError:
        return program, ties, {}


def _devices(program: ExportedProgram) -> set[str]:
    tensors = [*program.state_dict.values(), *program.constants.values()]
    return {tensor.device.type for tensor in tensors if isinstance(tensor, torch.Tensor)}


def _check_kind(program: ExportedProgram, where: str) -> None:
    dialect = getattr(program.verifier, "dialect", "")
    if dialect != _TRAINING:
        raise LoadError(
            f"{where}: its graph was rewritten for inference (run_decompositions, or an old torch; its dialect is "
            f"{dialect}), where detach() and no_grad() are gone, so that its gradients could be others than the "
            "model's; save what torch.export.export returns, as it is"
        )


def _flat_names(program: ExportedProgram, where: str) -> list[str]:
    """The arguments of its forward. Raises LoadError where one is no tensor."""
    spec = program.call_spec.in_spec
    nested = spec is None or any(not child.is_leaf() for group in _children(spec) for child in _children(group))
    if nested:
        raise LoadError(
            f"{where}: an argument of its forward is a list, tuple, dict or object, expected tensors by position or by "
            "name; wrap the model in one that takes them so"
        )
    names = []
    for one in program.graph_signature.input_specs:
        if one.kind is InputKind.USER_INPUT:
            if not isinstance(one.arg, TensorArgument):
                raise LoadError(
                    f"{where}: it was exported with an argument {one.arg.name!r} that is no tensor "
                    f"({getattr(one.arg, 'value', one.arg)!r}); leave it to its default when exporting"
                )
            names.append(one.arg.name)
    return names


def _children(spec: Any) -> list[Any]:
    found: Any = spec.children() if hasattr(spec, "children") else spec.children_specs
    return list(found)


def _inputs(program: ExportedProgram, where: str) -> dict[str, TensorSpec]:
    """What its inputs must look like: other shapes than it was exported for fail, or are computed wrongly."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for name in _flat_names(program, where):
        value = nodes[name].meta["val"]
        shape = tuple(extent if isinstance(extent, int) else str(extent) for extent in value.shape)
        found[name] = TensorSpec(name_of(value.dtype), shape)
    return found


def _module(program: ExportedProgram, ties: Mapping[str, str]) -> nn.Module:
    """The module of a program, as the engine takes modules: with eval(), and nothing that `.to` does not move."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: Any = program.module()
    # They raise; what the graph does depends on neither.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    for child in module.modules():
        for name, value in list(vars(child).items()):
            if isinstance(value, torch.Tensor):
                delattr(child, name)
                child.register_buffer(name, value, persistent=False)
        if isinstance(child, GraphModule):
            # What tracing left: fake tensors and lines of code, which a copy would copy.
            for node in child.graph.nodes:
                node.meta.clear()
            child.meta.clear()
    for name, first in ties.items():
        prefix, _, key = name.rpartition(".")
        module.get_submodule(prefix)._parameters[key] = module.get_parameter(first)
    type(module).forward.__signature__ = _signature(program)
    found: nn.Module = module
    return found


def _signature(program: ExportedProgram) -> inspect.Signature:
    """How its forward is to be called: what was given by keyword when it was exported is looked for there."""
    names = program.graph_signature.user_inputs
    by_keyword = _children(program.call_spec.in_spec)[1].num_children
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for index, name in enumerate(names):
        positional = index < len(names) - by_keyword
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD if positional else inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(str(name), kind))
    return inspect.Signature(parameters)


def _ties(program: ExportedProgram) -> dict[str, str]:
    """Parameters that are another one by a second name, by that name; to be asked before anything is moved.

    A file keeps their memory in common, but loads one object for each name, of which the graph uses one: a gradient by
    another would be missing, and what is given for it would do nothing.
    """
    users = {node.name: bool(node.users) for node in program.graph.nodes if node.op == "placeholder"}
    used = [
        one.target
        for one in program.graph_signature.input_specs
        if one.kind is InputKind.PARAMETER and one.target is not None and users[one.arg.name]
    ]
    at = {_memory(program.state_dict[name]): name for name in used}
    return {
        name: at[_memory(tensor)]
        for name, tensor in program.state_dict.items()
        if isinstance(tensor, nn.Parameter) and name not in used and _memory(tensor) in at
    }


def _memory(tensor: torch.Tensor) -> Any:
    # Empty tensors may all lie in one place; nothing depends on them.
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else object()


def _mode(program: ExportedProgram, told: Mapping[str, Any]) -> str:
    """Why there is no train mode, and which mode there is."""
    if told.get("mode"):
        return f"it was exported in {told['mode']} mode, which is fixed"
    flags = {
        bool(value)
        for node in _nodes(program.graph_module)
        for name, value in _arguments(node)
        if name in _TRAIN and isinstance(value, bool)
    }
    if flags == {True}:
        return "its mode is fixed: it was exported in train mode (it holds dropout or normalisation of that mode)"
    if flags == {False}:
        return "its mode is fixed: it was exported in eval mode"
    if flags:
        return "its mode is fixed: some of its modules were exported in train mode, others in eval mode"
    return "its mode is fixed: it is the one that it was exported in"


def _nodes(module: GraphModule) -> Iterator[torch.fx.Node]:
    for child in module.modules():
        if isinstance(child, GraphModule):
            yield from child.graph.nodes


def _arguments(node: torch.fx.Node) -> Iterator[tuple[str, Any]]:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        yield from zip(map(operator.attrgetter("name"), schema.arguments), node.args, strict=False)
        yield from node.kwargs.items()


def _notes(told: Mapping[str, Any]) -> tuple[str, ...]:
    compared = told.get("compared")
    if compared:
        return (f"What is served is the derivative of the exported forward; {compared}.",)
    return (
        "What is served is the derivative of the exported forward: custom backwards (autograd.Function), hooks and "
        "torch.inference_mode of the original are not in it, and nobody compared the two.",
    )
