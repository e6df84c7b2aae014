"""`remote_function`: a hosted model as a function that JAX transforms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The rules that make the primitives run.
import pullback.jax._lowering  # noqa: F401
from pullback import errors
from pullback._info import ModelInfo, TensorInfo
from pullback._loss import Loss
from pullback._model import RemoteModel
from pullback.jax._call import Call, Point, batched_inputs, draws_nothing
from pullback.jax._primitives import evaluate_p
from pullback.jax._signature import as_jax, outs_of, point, signed

Named = dict[str, jax.Array]


def remote_function(
    model: RemoteModel,
    *,
    rows: bool = False,
    outputs: Any = None,
    loss: str | Loss | None = None,
    train: bool = False,
    timeout: float | None = None,
    concurrency: int = 8,
) -> RemoteFunction:
    """A hosted model as a pure function of JAX arrays, for grad, value_and_grad, jvp, vjp, jacfwd, jacrev, hessian,
    linearize, jit, vmap, checkpoint, scan, and what can be made of them, to second order.

        energy = remote_function(client.model("energy"))
        value, gradient = jax.jit(jax.value_and_grad(energy))(positions)  # one call of the server

        density = remote_function(client.model("density"), rows=True)  # of one point, though the model takes many
        values, gradients = jax.vmap(jax.value_and_grad(density))(points)  # one call of the server

    model: from `Client.model`.
    rows: True: the function takes one row of each input, without the model's batch axis, and returns one row of each
        output. Under vmap, nested too, all rows go in one call where the server has proven that they are independent.
        Of a loss's tensors `target` is one row as well, the others go as they are.
    outputs: shapes and dtypes of the outputs: a jax.ShapeDtypeStruct, a dict of them by name where there are several,
        or a function that returns this for a dict of the inputs' ones. None: they are what the model's signature says;
        where it does not, the first trace with new shapes of inputs evaluates the model once, at made-up points.
    loss: as of RemoteModel's methods; the function is then the loss.
    train: run as after module.train(); needs a seed with each call, as JAX's functions are pure.
    timeout: seconds of each call of the server and its retries; None: the client's default.
    concurrency: calls at a time where vmap cannot make one of them.

    JAX's conventions hold, also for complex numbers, whose gradients are the conjugates of torch's. Dtypes are kept:
    64 bits need jax_enable_x64.

    Raises TypeError, ValueError for arguments that cannot be; nothing is sent before the function is called.
    """
    return RemoteFunction(model, rows, outputs, loss, train, timeout, concurrency)


class RemoteFunction:
    """A hosted model as a JAX function, made by `remote_function`. Hashable by identity, safe in many threads.

        f(x, y); f(x, mask=m); f({"x": x, "y": y})
        f(x, parameters={"head.weight": w}); f(x, target=t); f(x, seed=jax.random.key(0))

    inputs: in the order of the model's code, or by name, or one dict by name; None leaves an optional one out. Arrays
        of JAX's or numpy's, or numbers. Integers may have fewer bits than the model declares.
    parameters: by name, used instead of the hosted ones; gradients flow to them as to inputs.
    target, targets: of the loss, by name; gradients flow to floating-point ones where the loss has them.
    seed: an int, or a key of jax.random: what random numbers of the model are drawn by. Without one, a model that draws
        some in eval mode too draws the same in every call.

    Returns an array, or a dict by name where the model has several outputs.

    Raises, while JAX traces: TypeError for dtypes, BadName, BadTensor for names and shapes, what the server says of the
    model, and OrderUnavailable for derivatives that it surely does not have. When the function runs: PullbackError;
    inside jit JAX raises its own JaxRuntimeError instead (or a ValueError, by the way that it calls what is compiled),
    whose message has the client's error, class and sentence.
    """

    def __init__(
        self,
        model: RemoteModel,
        rows: bool,
        outputs: Any,
        loss: str | Loss | None,
        train: bool,
        timeout: float | None,
        concurrency: int,
    ) -> None:
        if not isinstance(model, RemoteModel):
            raise TypeError(f"model is a {type(model).__name__}, expected what client.model(name) returns")
        if isinstance(concurrency, bool) or not isinstance(concurrency, int) or concurrency < 1:
            raise ValueError(f"concurrency is {concurrency!r}, expected 1 or more")
        self.model = model
        self._rows, self._outputs, self._train = rows, outputs, train
        self._loss = Loss(loss) if isinstance(loss, str) else loss
        self._timeout, self._concurrency = timeout, concurrency
        self._calls: dict[Any, Call] = {}
        # What jax.jit shows, and what functools.wraps in JAX looks for.
        self.__name__ = model.name

    def __reduce__(self) -> Any:
        given = (self.model, self._rows, self._outputs, self._loss, self._train, self._timeout, self._concurrency)
        return RemoteFunction, given

    def __repr__(self) -> str:
        return f"remote_function({self.model!r}{', rows=True' if self._rows else ''})"

    def __call__(
        self,
        *inputs: Any,
        parameters: Mapping[str, Any] | None = None,
        target: Any = None,
        targets: Mapping[str, Any] | None = None,
        seed: Any = None,
        **named: Any,
    ) -> Any:
        """The function's value; see the class."""
        info = self._ready()
        if target is not None:
            targets = {"target": target, **(targets or {})}
        if targets and self._loss is None:
            raise TypeError("a target is given, and remote_function was made without a loss")
        points: list[Point] = []
        operands: list[jax.Array] = []
        extents: dict[str, int] = {}
        batched = batched_inputs(info)

        def add(place: Any, values: Mapping[str, Any], specs: Mapping[str, TensorInfo]) -> None:
            for name, value in values.items():
                spec = specs.get(name)
                array = as_jax(value, f"{place} {name!r}", spec)
                has_axis = name in batched if place == "input" else self._rows and (place, name) == ("target", "target")
                points.append(point(place, name, array, spec, has_axis, self._rows, info.batch_axis, extents))
                operands.append(array)

        add("input", _by_name(info, inputs, named), {spec.name: spec for spec in info.inputs})
        declared = {spec.name: spec for spec in info.parameters}
        for name in parameters or {}:
            if name not in declared:
                raise errors.BadName(f"model {info.name!r} has no parameter {name!r}")
        add("param", parameters or {}, declared)
        add("target", targets or {}, {})
        if seed is not None:
            points.append(Point("seed", "seed", (2,), np.dtype(np.uint32), np.dtype(np.uint32)))
            operands.append(_seed(seed))
        elif self._train:
            raise TypeError("seed is missing: in train mode a model draws random numbers, and JAX's functions are pure")
        call = self._call(info, tuple(points), extents)
        found = evaluate_p.bind(*operands, call=call, sizes=(), masks=((),) * len(points))
        if len(call.outs) == 1:
            return found[0]
        return {out.name: value for out, value in zip(call.outs, found, strict=True)}

    def _ready(self) -> ModelInfo:
        info = self.model.info
        if info.state != "ready":
            raise errors.NotReady(f"model {info.name!r} is {info.state}: {info.state_reason or 'no reason given'}")
        if self._rows and info.batch_axis is None:
            raise errors.UnsupportedByModel(
                f"model {info.name!r} declares no batch_axis, and rows=True makes one of its rows the function's input"
            )
        return info

    def _call(self, info: ModelInfo, points: tuple[Point, ...], extents: Mapping[str, int]) -> Call:
        """The call for such points: always the same one, as JAX's caches know it by identity."""
        key = (points, info.version, info.revision, jax.config.jax_enable_x64)  # type: ignore[attr-defined]
        call = self._calls.get(key)
        if call is None:
            told = self._outputs
            if told is None and self._loss is None and not self._train:
                told = signed(info, points, extents, self._rows)
            outs = outs_of(self.model, info, points, self._rows, self._loss, self._train, told, self._timeout)
            call = Call(
                model=self.model,
                points=points,
                outs=outs,
                loss=self._loss,
                train=self._train,
                rows=self._rows,
                axis=info.batch_axis,
                timeout=self._timeout,
                concurrency=self._concurrency,
                version=(info.version, info.revision),
                # JAX takes functions for pure: a value and its derivatives must not be those of two draws.
                fixed_seed=None if draws_nothing(info) else 0,
            )
            call = self._calls.setdefault(key, call)
        return call


def _by_name(info: ModelInfo, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs by name, in the model's order. Raises BadName."""
    names = [spec.name for spec in info.inputs]
    if len(inputs) == 1 and isinstance(inputs[0], Mapping):
        given = dict(inputs[0])
    elif len(inputs) > len(names):
        raise errors.BadName(f"{len(inputs)} inputs are given, model {info.name!r} takes {', '.join(map(repr, names))}")
    else:
        given = dict(zip(names, inputs, strict=False))
    for name in named:
        if name in given:
            raise errors.BadName(f"the input {name!r} is given twice")
    given |= named
    unknown = [name for name in given if name not in names]
    missing = [spec.name for spec in info.inputs if not spec.optional and given.get(spec.name) is None]
    if unknown or missing:
        said = f"no input {unknown[0]!r}" if unknown else f"an input {missing[0]!r}, which is missing"
        raise errors.BadName(f"model {info.name!r} has {said}; it takes {', '.join(map(repr, names))}")
    return {name: given[name] for name in names if given.get(name) is not None}


def _seed(seed: Any) -> jax.Array:
    """64 bits of a seed, as JAX has them in either mode: [high, low], uint32. Raises TypeError, ValueError."""
    if isinstance(seed, int | np.integer) and not isinstance(seed, bool):
        if not 0 <= int(seed) < 2**64:
            raise ValueError(f"seed is {seed}, expected 0 to 2**64 - 1")
        return jnp.asarray(np.array([int(seed) >> 32, int(seed) & 0xFFFFFFFF], np.uint32))
    dtype = getattr(seed, "dtype", None)
    if dtype is not None and (jnp.issubdtype(dtype, jax.dtypes.prng_key) or (dtype == np.uint32 and seed.ndim == 1)):
        return jax.random.bits(seed, (2,), jnp.uint32)
    raise TypeError(f"seed is a {type(seed).__name__}, expected an int or a key of jax.random")
