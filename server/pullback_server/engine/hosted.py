"""A model as a worker holds it: built, on its device, in eval mode, and never changed by a call."""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import types
import weakref
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from pullback_server.engine._dtypes import WIRE
from pullback_server.engine.binding import bind
from pullback_server.engine.guards import Randomness
from pullback_server.engine.modes import autocast, autocast_dtype, checkpoint_modules, is_recurrent
from pullback_server.engine.plan import Plan
from pullback_server.engine.reach import Reference, references
from pullback_server.faults import Fault
from pullback_server.hosting import Registration
from pullback_server.hosting.loading import LoadError
from pullback_server.job import BatchRecord, CheckRecord, HealthRecord, OrdersRecord, SpecRecord
from pullback_wire import Reason
from pullback_wire.dtypes import dtype_number

_log = logging.getLogger(__name__)

_COMPILED = "_orig_mod."


class HostedModel:
    """One version of one model.

    Between calls no parameter requires grad, so that a call for input gradients records nothing for parameters; a call
    that differentiates by some of them lets just those require grad while it runs. `natural` is what the factory had
    set, for the models whose own code differentiates by their parameters.
    """

    def __init__(
        self, registration: Registration, target: nn.Module | Callable[..., Any], device: torch.device
    ) -> None:
        self.registration = registration
        self.owner = f"model {registration.name!r}"
        self.device = device
        #: What its forward is cast to; None: nothing is.
        self.autocast = autocast_dtype(registration, device)
        self.code: Callable[..., Any] = target
        self.module = target if isinstance(target, nn.Module) else None
        self.binding = bind(registration, _forward(target))
        self.ranges = {
            name: (spec.low, spec.high)
            for name, spec in registration.inputs.items()
            if spec.low is not None or spec.high is not None
        }
        #: What was declared of inputs, and can be held against a tensor.
        self.specs = [record for record in self.input_records() if record.dtype or record.shape is not None]
        #: Parameters by the name callers use; a tied one by its first name.
        self.parameters: dict[str, nn.Parameter] = {}
        #: Second names of tied parameters -> first names.
        self.aliases: dict[str, str] = {}
        self.natural: dict[str, bool] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._buffers: list[tuple[nn.Module, str, torch.Tensor]] = []
        self._recurrent: list[nn.Module] = []
        #: Copies of the buffers as they were, for the model that turns out to write into them.
        self._pristine: list[torch.Tensor] = []
        #: What the module should hold after a call: where, key, tensor, version. The buffers come first.
        self._expected: list[tuple[dict[str, Any], str, torch.Tensor, int]] = []
        #: Learned from what happened: the model writes into its inputs, buffers, parameters.
        self.writes_inputs = False
        self.writes_buffers = False
        self.writes_parameters = False
        #: Learned too late: parameters were written and there is no copy. The model must be built anew.
        self.spoilt = False
        #: Modes (train or not) in which a first run was watched for writes to parameters.
        self._watched: set[bool] = set()
        self._snapshot: dict[str, torch.Tensor] | None = None
        #: Learned: its own code differentiates by its parameters.
        self.needs_natural = False
        #: Circumstances (tape_model) in which a call was seen to leave its inputs as they were.
        self.spared: set[Any] = set()
        #: Learned, or so by its options: its graphs hold on to modules, to run them again in the backward.
        self.recomputes = bool(registration.options.checkpoint)
        #: Parameters that its code may find elsewhere than in its modules, and buffers: there others cannot stand in.
        self.kept: dict[str, Reference] = {}
        self.kept_buffers: dict[str, Reference] = {}
        #: Kinds of nodes, not torch's own, that its forwards were seen to make.
        self.met: weakref.WeakSet[type] = weakref.WeakSet()
        #: Whether the health of its numbers is looked at.
        chosen = registration.options.gradient_health
        self.health = HealthRecord(chosen.enabled, chosen.vanishing_below, chosen.exploding_above)
        self.examined = chosen.enabled
        #: Whether it consists of torch's own modules alone.
        self.stock = False
        #: Whether code compiled by torch.compile is inside.
        self.compiled = False
        #: Code other than torch's that runs in backwards whatever the graph says: hooks.
        self.hooked = False
        #: Whether forward mode gave the adjoint of reverse mode when it was probed; where not, it is not used.
        self.forward_mode = not registration.abilities.forward_mode
        #: Why no JVP of it is right, where the probe found that; empty: nothing stands against them.
        self.no_jvp = ""
        #: What of a graph that is not torch's own was proven to be differentiable twice.
        self.proven: set[Any] = set()
        #: Whether the backwards in `proven` are the derivatives of their forwards. Those that are not (straight-through
        #: estimators) are proven as what they are, but what a loss makes of their outputs is another matter.
        self.honest = True
        #: While probing: nothing is refused, and what is met is noted.
        self.probing = False
        self.seen: set[Any] = set()
        self.orders = OrdersRecord(1, False, "not probed")
        #: What the gate found, and the seconds of one VJP of a sample.
        self.checks: list[CheckRecord] = []
        self.gradient_seconds = 0.0
        #: How its requests may be merged.
        self.batch = BatchRecord()
        #: The inputs that have the batch axis, where its rows were found to be independent of each other; else empty.
        self.batched_inputs: frozenset[str] = frozenset()
        #: Whether gradients by parameters were found to be sums over its rows, whatever parts those are taken in.
        self.additive = False
        #: How many merged computations were compared with one of their members alone, by kind.
        self.checked_batches: dict[str, int] = {}
        self.outputs: list[SpecRecord] = [SpecRecord(name) for name in registration.outputs or ()]
        #: What torch.compile made of it; None: nothing, or nothing that could be used.
        self.plans: Plan | None = None
        #: That in words; empty: it was not asked for.
        self.plan = ""
        if self.module is not None:
            self._take_stock(self.module)
        #: cuDNN's recurrent kernels have no backward in eval mode, and none of second order.
        self.without_cudnn = device.type == "cuda" and (bool(self._recurrent) or is_recurrent(self.module))

    def _take_stock(self, module: nn.Module) -> None:
        by_identity: dict[int, str] = {}
        for prefix, child in module.named_modules():
            self.compiled |= hasattr(child, "_orig_mod") or getattr(child, "_compiled_call_impl", None) is not None
            self.hooked |= bool(child._backward_hooks or child._backward_pre_hooks)
            if isinstance(child, nn.RNNBase):
                self._recurrent.append(child)
            for key, parameter in child._parameters.items():
                if parameter is None:
                    continue
                name = f"{prefix}.{key}".removeprefix(".").replace(_COMPILED, "")
                self._take_parameter(name, parameter, by_identity)
                self._places[self.aliases.get(name, name)].append((child, key))
            for key, buffer in child._buffers.items():
                if buffer is not None:
                    self._buffers.append((child, key, buffer))
        self._pristine = [buffer.detach().clone() for _, _, buffer in self._buffers]
        self._expected = [(child._buffers, key, buffer, buffer._version) for child, key, buffer in self._buffers]
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            self.hooked |= bool(parameter._backward_hooks)
            for child, key in self._places[name]:
                self._expected.append((child._parameters, key, parameter, parameter._version))

        # A backward that runs modules again must find them as they were, whosever they are.
        self.stock = not (self.hooked or self.compiled or self.recomputes) and all(map(_is_stock, module.modules()))
        if not self.stock:
            self.kept = references(module, {id(own): name for name, own in self.parameters.items()})
            self.kept_buffers = references(module, {id(buffer): key for _, key, buffer in self._buffers})

    def _take_parameter(self, name: str, parameter: nn.Parameter, by_identity: dict[int, str]) -> None:
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise LoadError(f"{self.owner}: its parameter {name!r} is not initialised; run the lazy module once first")
        first = by_identity.setdefault(id(parameter), name)
        if first != name:
            self.aliases[name] = first
            return
        if parameter.dtype not in WIRE:
            raise LoadError(f"{self.owner}: its parameter {name!r} is {parameter.dtype}, which cannot travel")
        self.parameters[name] = parameter
        self.natural[name] = parameter.requires_grad
        self._places[name] = []

    def storages(self) -> list[torch.UntypedStorage]:
        """The memory of its parameters and buffers."""
        return [tensor.untyped_storage() for _, _, tensor, _ in self._expected]

    @property
    def memory(self) -> int:
        """Bytes of its parameters and buffers."""
        return sum({storage._cdata: storage.nbytes() for storage in self.storages()}.values())

    def buffers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The buffers that its modules hold, each with a copy of what it was at first."""
        return [(buffer, pristine) for (_, _, buffer), pristine in zip(self._buffers, self._pristine, strict=True)]

    # What a call changes for its own time.

    def check_train(self) -> None:
        """Raises Fault (UNSUPPORTED_BY_MODEL) where there is no train mode."""
        if why := self.registration.abilities.train:
            raise Fault(Reason.UNSUPPORTED_BY_MODEL, f"{self.owner} cannot be put into train mode: {why}", "train")

    def check_exchange(self, name: str) -> None:
        """Raises Fault (UNSUPPORTED_BY_MODEL) where nothing can stand in for its parameters."""
        if why := self.registration.abilities.parameters:
            raise Fault(
                Reason.UNSUPPORTED_BY_MODEL,
                f"nothing can stand in for the parameter {name!r} of {self.owner}: {why}",
                f"parameters[{name}]",
            )

    def precision(self) -> contextlib.AbstractContextManager[object]:
        """Around its forward: autocast, where it was asked for."""
        return autocast(self.autocast, self.device)

    def enter_training(self) -> Callable[[], None]:
        """Train mode, as module.train() makes it. Returns what makes every module as it was. Raises Fault."""
        self.check_train()
        module = self.module
        if module is None:
            return lambda: None
        flags = [(child, child.training) for child in module.modules()]

        def leave() -> None:
            module.eval()
            for child, flag in flags:
                child.training = flag

        try:
            module.train()
        except BaseException:
            leave()
            raise
        return leave

    def swap(self, parameters: Mapping[str, torch.Tensor], private_buffers: bool) -> Callable[[], None]:
        """Lets the module use other tensors for some parameters, and copies of its buffers. Returns what undoes it.

        As torch.func.functional_call does, but until the derivatives are computed: recomputation (checkpoints) happens
        in the backward, and must see the same parameters. Raises Fault where nothing can stand in for them.
        """
        for name in parameters:
            self.check_exchange(name)
        undo: list[tuple[dict[str, Any], str, Any]] = []
        recurrent = [
            (child.__dict__, child.__dict__.get("_flat_weights"), child.__dict__.get("_flat_weight_refs"))
            for child in self._recurrent
        ]
        for name, tensor in parameters.items():
            for child, key in self._places[name]:
                undo.append((child._parameters, key, child._parameters[key]))
                child._parameters[key] = tensor  # type: ignore[assignment]
        if private_buffers:
            for (child, key, buffer), pristine in zip(self._buffers, self._pristine, strict=True):
                undo.append((child._buffers, key, buffer))
                child._buffers[key] = pristine.clone()

        def back() -> None:
            # Backwards: two names in TorchScript may be one place, whose second value is already the caller's.
            for place, key, value in reversed(undo):
                place[key] = value
            for own, weights, refs in recurrent:
                # They keep lists of their weights, which would hold on to the caller's.
                own["_flat_weights"], own["_flat_weight_refs"] = weights, refs

        return back

    def let_require_grad(self, names: Mapping[str, bool]) -> Callable[[], None]:
        """Lets some parameters require grad. Returns what undoes it."""
        changed = [self.parameters[name] for name, wanted in names.items() if wanted]
        for parameter in changed:
            parameter.requires_grad_(True)

        def back() -> None:
            for parameter in changed:
                parameter.requires_grad_(False)
                # A model that runs backward() itself leaves its gradients behind.
                parameter.grad = None

        return back

    def watch_parameters(self, train: bool) -> None:
        """Before a call: the first one in each mode leaves a copy of the parameters to compare with.

        Later writes show in the version counters, but the first must not be lost, and `.data` does not count.
        """
        if not self.writes_parameters and train not in self._watched and self.parameters:
            self._watched.add(train)
            self._snapshot = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    def _undo_first_writes(self) -> bool:
        snapshot, self._snapshot = self._snapshot, None
        wrote = False
        for name, before in (snapshot or {}).items():
            now = self.parameters[name].detach()
            if not same(now, before):
                now.copy_(before)
                wrote = self.writes_parameters = True
        if snapshot is not None:
            # What is as it was need not be put back again below.
            self._expected = [
                (place, key, tensor, tensor._version if index >= len(self._buffers) else version)
                for index, (place, key, tensor, version) in enumerate(self._expected)
            ]
        return wrote

    def restore_state(self) -> bool:
        """Undoes what the model's code did to its own buffers and parameters.

        Returns whether it did anything, which is remembered: from then on calls get copies.
        """
        wrote = self._undo_first_writes()
        for place, key, tensor, version in self._expected:
            if _at(place, key) is not tensor or tensor._version != version:
                break
        else:
            return wrote
        for index, (place, key, tensor, version) in enumerate(self._expected):
            if _at(place, key) is tensor and tensor._version == version:
                continue
            if index < len(self._buffers):
                self.writes_buffers = True
                # Not in place: a graph may hold the tensor that was written.
                tensor = self._pristine[index].clone()
                self._buffers[index] = (*self._buffers[index][:2], tensor)
            else:
                # Another tensor in its place is put back below; of one that was written there is no copy.
                self.writes_parameters = True
                self.spoilt |= tensor._version != version
            place[key] = tensor
            self._expected[index] = (place, key, tensor, tensor._version)
        return True

    def rebuilt(self) -> HostedModel:
        """The model as its factory makes it, knowing what was learned. Raises LoadError."""
        fresh = build(self.registration, self.device)
        for name in (
            "writes_inputs",
            "writes_buffers",
            "writes_parameters",
            "needs_natural",
            "recomputes",
            "forward_mode",
            "no_jvp",
            "proven",
            "honest",
            "orders",
            "outputs",
            "batch",
            "batched_inputs",
            "additive",
            "checked_batches",
            "checks",
            "gradient_seconds",
        ):
            setattr(fresh, name, getattr(self, name))
        if self.plan:
            # Only such a model is built anew, and other tensors stand for its parameters from now on.
            fresh.plan = "refused: it writes into its own parameters"
        return fresh

    def drop_plan(self, why: str) -> None:
        """From now on it runs as it is written."""
        self.plans = None
        self.plan = f"dropped: {why}"
        _log.warning("%s: its compiled plan is dropped: %s", self.owner, why)

    def widened(self) -> HostedModel:
        """A copy in double precision, for probing. Raises whatever the model's own copying raises."""

        def widen(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                return tensor.double()
            return tensor.to(torch.complex128) if tensor.is_complex() else tensor

        if self.module is None:
            twin = HostedModel(self.registration, self.code, self.device)
        else:
            module = copied(self.module, widen)
            twin = HostedModel(self.registration, module, self.device)
            twin.natural = self.natural
        # Its derivatives are held against differences, which narrow types would drown in rounding.
        twin.autocast = None
        return twin

    def input_records(self) -> list[SpecRecord]:
        """The inputs, for the signature."""
        records = []
        for name in self.binding.names:
            spec = self.registration.inputs.get(name)
            if spec is None:
                records.append(SpecRecord(name, optional=name in self.binding.optional))
            else:
                number = 0 if spec.dtype is None else dtype_number(spec.dtype)
                records.append(SpecRecord(name, number, spec.shape, name in self.binding.optional, spec.low, spec.high))
        return records

    def parameter_records(self) -> list[SpecRecord]:
        """The parameters, for the signature."""
        return [
            SpecRecord(name, WIRE[parameter.dtype], tuple(parameter.shape))
            for name, parameter in self.parameters.items()
        ]


_BASE = frozenset(vars(nn.Module()))
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, weakref.ref)


def _is_stock(module: nn.Module) -> bool:
    return (
        type(module).__module__.startswith("torch.nn.modules.")
        and "forward" not in vars(module)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not hasattr(module, "parametrizations")
        and all(type(parameter) in (nn.Parameter, type(None)) for parameter in module._parameters.values())
        # A layer may be given code of somebody's own, say as its activation.
        and all(_is_torchs(value) for name, value in vars(module).items() if name not in _BASE)
    )


def _is_torchs(value: Any) -> bool:
    """Whether a layer's attribute is a plain value, or a function of torch's own."""
    if isinstance(value, _PLAIN) or type(value) in (torch.Tensor, nn.Parameter):
        return True
    if isinstance(value, (tuple, list)):
        return all(map(_is_torchs, value))
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return str(value.__module__).partition(".")[0] == "torch"
    return False


def _forward(target: nn.Module | Callable[..., Any]) -> Callable[..., Any]:
    """What holds the signature: a compiled module's own takes anything."""
    if not isinstance(target, nn.Module):
        return target
    inner = getattr(target, "_orig_mod", None)
    return _forward(inner) if isinstance(inner, nn.Module) else target.forward


def copied(module: nn.Module, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> nn.Module:
    """A deep copy, with the hooks on parameters, which torch's copies of them do not have.

    change: what is done to its parameters and buffers. Raises whatever the module's own copying raises.
    """
    found: nn.Module = copy.deepcopy(module)
    if change is not None:
        found._apply(change)  # type: ignore[no-untyped-call]
    twins = dict(found.named_parameters())
    for name, own in module.named_parameters():
        twin = twins.get(name)
        if twin is None or twin is own or not own._backward_hooks or twin._backward_hooks:
            continue
        requires = twin.requires_grad
        # Else there is nothing to hang them on.
        twin.requires_grad_(True)
        for hook in own._backward_hooks.values():
            twin.register_hook(hook)  # type: ignore[no-untyped-call]
        twin.requires_grad_(requires)
    return found


def build(registration: Registration, device: torch.device) -> HostedModel:
    """Runs the factory and takes its model to the device. Raises LoadError naming the model and the cause."""
    owner = f"model {registration.name!r}"
    target = registration.target
    if isinstance(target, nn.Module):
        module = copied(target)
    elif registration.kind == "function" or (registration.kind == "auto" and takes_arguments(target)):
        if registration.options.checkpoint:
            raise LoadError(f"{owner}: checkpoint names modules, which a function has none of")
        return HostedModel(registration, target, device)
    else:
        try:
            module = _made(registration, device)
        except LoadError:
            raise
        except (Exception, SystemExit) as error:
            raise LoadError(f"{owner}: its factory failed: {type(error).__name__}: {error}") from error
        if not isinstance(module, nn.Module):
            raise LoadError(
                f"{owner}: its factory returned a {type(module).__name__}, expected an nn.Module; for a function of "
                'tensors say kind="function"'
            )
    try:
        checkpoint_modules(registration, module)
        return HostedModel(registration, module.to(device).eval(), device)
    except LoadError:
        raise
    except Exception as error:
        raise LoadError(f"{owner}: cannot be moved to {device}: {type(error).__name__}: {error}") from error


def _made(registration: Registration, device: torch.device) -> Any:
    """What the factory returns; with the same random numbers in every worker and in what replaces one.

    Else two workers would hold two models where weights are drawn at random.
    """
    randomness = Randomness(zlib.crc32(f"{registration.name}/{registration.version}".encode()), device)
    randomness.begin()
    randomness.restart()
    try:
        return registration.target()
    finally:
        randomness.end()


def takes_arguments(target: Callable[..., Any]) -> bool:
    """Whether a registered object is a function of tensors, not a factory."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return False
    if isinstance(target, type) and issubclass(target, nn.Module):
        return False
    required = [p for p in parameters if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    return bool([p for p in required if p.kind is not p.VAR_POSITIONAL]) or (
        bool(required) and not isinstance(target, type)
    )


def _at(place: Any, key: str) -> Any:
    """What a module holds under a key; a scripted module's own mapping knows no `get`."""
    try:
        return place[key]
    except KeyError:
        return None


def same(now: torch.Tensor, before: torch.Tensor) -> bool:
    """Whether two tensors are equal, NaN being equal to itself."""
    return bool(((now == before) | ((now != now) & (before != before))).all())
