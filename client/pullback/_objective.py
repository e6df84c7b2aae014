"""`Objective`: a hosted function as optimisers over flat vectors want one."""

from __future__ import annotations

import copy
import secrets
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pullback import errors
from pullback._arrays import Array
from pullback._blocking import run
from pullback._function import INPUT, PARAMETER, TARGET, Function
from pullback._info import ModelInfo
from pullback._loss import Loss, resolve_loss
from pullback._naming import by_name, name_inputs
from pullback._packing import Packing, choose, hosted
from pullback._points import Point, Points
from pullback._residuals import matrix, number_among, operator, take_residuals

if TYPE_CHECKING:
    from pullback._held import Held
    from pullback._model import RemoteModel


class Objective:
    """A hosted function of one flat float64 vector, with its derivatives. Made by `RemoteModel.objective`.

        o = model.objective({"x": start, "data": data}, wrt="x")
        found = scipy.optimize.minimize(o.fun, o.x0, jac=o.jac, hessp=o.hessp, method="trust-ncg")
        o.unpack(found.x)["x"]

    For a real scalar function `fun`, `jac`, `hess` and `hessp`; for any other `residuals`, `jacobian` and
    `jacobian_operator`, as least_squares wants them. They share what was computed at the last few points: fun and jac
    at one x are one call. Everything is NumPy; only `jacobian_operator` loads scipy.

    The vector holds the arrays that vary, raveled, one after the other. Each goes to the server in its own dtype, and
    results come back as float64: where a model computes in float32, values are good to about 1e-7 of their size, so ask
    a solver for no more (gtol=1e-4 rather than 1e-8), and do not let it take differences.

    What is given here is copied: what is fixed stays as it is now. With train=True and no seed, one is drawn now, so
    that it is one function. It is the function of the model version that is ready now: Aborted is raised where another
    one answers later. NaN and infinities are values, and come back as such.

    Safe in many threads; pickles and forks: a copy begins with nothing computed.

    Raises, from its methods: ValueError and TypeError for an x of another shape or kind; OrderUnavailable for hess and
    hessp of a model that promises no second order; UnusedInput where the function does not depend on what varies;
    MissingCotangent from fun and its derivatives for what is not one real scalar; ComplexUnsupported; and what any
    call raises.
    """

    def __init__(
        self,
        model: RemoteModel,
        inputs: Any,
        wrt: str | Sequence[str] | None,
        loss: str | Loss | None,
        target: Any,
        targets: Mapping[str, Any] | None,
        parameters: Mapping[str, Any] | None,
        train: bool,
        seed: int | None,
        timeout: float | None,
    ) -> None:
        # What the model is now, and not what another call was once told.
        model._caller.forget()
        info = model._caller.signature(timeout)

        async def known() -> ModelInfo:
            return info

        found, every = resolve_loss(loss, target, targets)
        given = {INPUT: run(name_inputs(inputs, known)).arrays, PARAMETER: by_name(parameters, "parameters")}
        chosen = choose(info, wrt, given[INPUT], given[PARAMETER])
        missing = [name for kind, name in chosen if name not in given[kind]]
        if missing:
            given[PARAMETER] = given[PARAMETER] | hosted(model, missing, timeout)
        starts = [given[kind][name] for kind, name in chosen]
        # The loss's own tensors travel with it. Without one they are what residuals are measured from.
        given[TARGET] = {} if found is None else {n: array for n, array in every.items() if n not in found.tensors}
        self._wanted = {name: np.array(array) for name, array in every.items()} if found is None else {}
        fixed = {
            kind: {name: np.array(array) for name, array in arrays.items() if (kind, name) not in chosen}
            for kind, arrays in given.items()
        }
        if train and seed is None:
            seed = secrets.randbits(63)
        version = info.version, info.revision
        self._function = Function(model, version, _copied(found), fixed, train, seed, timeout)
        self._packing = Packing(chosen, starts)
        self._points = Points()
        self._start = self._packing.joined(starts)

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("_start", "_function", "_packing", "_wanted")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._points = Points()

    def __repr__(self) -> str:
        varying = ", ".join(f"{one.key}: {one.dtype}{list(one.shape)}" for one in self._packing.variables)
        return f"<Objective of {self._function.model!r}: {self._packing.size} numbers ({varying})>"

    @property
    def calls(self) -> Counter[str]:
        """How many calls were made, by their kind: "evaluate", "vjp", "jvp", "hvp", "hessian", "jacobian", and in a
        session "call" (a forward) and "grad" (a backward). `.total()` of them; `.clear()` starts anew.
        """
        return self._function.calls

    # ---- vectors and arrays

    @property
    def x0(self) -> Array:
        """The vector of the starting values, float64 [n]."""
        return self._start.copy()

    def pack(self, arrays: Mapping[str, Any]) -> Array:
        """The vector, float64 [n], of an array for each name that varies. Raises BadName, ValueError, TypeError."""
        return self._packing.pack(arrays)

    def unpack(self, x: Any) -> dict[str, Array]:
        """The arrays of a vector by name, each in the shape and dtype in which it goes to the server."""
        arrays = self._packing.split(self._packing.vector(x))
        return {one.key: array for one, array in zip(self._packing.variables, arrays, strict=True)}

    def bounds(self) -> tuple[Array, Array]:
        """Lower and upper bounds, float64 [n] each, from the model's signature; infinite where it declares none.

            minimize(o.fun, o.x0, jac=o.jac, bounds=scipy.optimize.Bounds(*o.bounds()))
            least_squares(o.residuals, o.x0, jac=o.jacobian, bounds=o.bounds())

        Raises PullbackError.
        """
        return self._packing.bounds(self._function.model._caller.signature(self._function.timeout))

    # ---- a real scalar function

    def fun(self, x: Any) -> float:
        """Its value at x, float64 [n].

        The gradient is computed along, unless nobody asked for those of the two points before.
        """
        point = self._at(x)
        if point.value is None:
            if self._points.is_gradient_likely(point):
                self._first_order(point)
            else:
                point.value = self._number(self._evaluate(point))
        assert point.value is not None
        return point.value

    def jac(self, x: Any) -> Array:
        """Its gradient at x, float64 [n]."""
        return self._gradient(self._at(x)).copy()

    def value_and_grad(self, x: Any) -> tuple[float, Array]:
        """Both, of one call: for minimize(o.value_and_grad, o.x0, jac=True), and for optimisers that want a pair."""
        point = self._at(x)
        gradient = self._gradient(point)
        assert point.value is not None
        return point.value, gradient.copy()

    def hess(self, x: Any) -> Array:
        """Its dense Hessian at x, float64 [n, n], H[i, j] = ∂²f/∂x[i]∂x[j]; the value and the gradient come along.

        Of a model with a backward of its own it is the derivative of that as written, and need not be symmetric.

        Raises ResultTooLarge, before anything is computed; then use `hessp`.
        """
        point = self._at(x)
        if point.hessian is None:
            self._second_order(point)
        assert point.hessian is not None
        return point.hessian.copy()

    def hessp(self, x: Any, p: Any) -> Array:
        """Its Hessian at x times p, float64 [n]: ∂<∇f, p>/∂x.

        The graph of the gradient stays on the server, in a session: each further product at x is one backward.

        Of a model with a backward of its own it is the derivative of the backward as written, Hᵀp for the H of `hess`.
        """
        point = self._at(x)
        tangents = self._packing.tangents(p)
        found = self._function.in_session(lambda held: self._product(held, point, list(tangents.values())))
        if found is None:
            result = self._stateless("hvp", point, tangents, allow_unused=True)
            self._learn(point, _named(result.outputs), list(result.gradients.values()))
            found = list(result.hvps.values())
        # Not before: a model may have first derivatives alone.
        point.products = True
        return self._packing.joined(found)

    def _product(self, held: Held, point: Point, tangents: Sequence[Array]) -> list[Array | None]:
        if not held.has_graph(point.key):
            self._gradient_in_session(held, point, True)
        return held.product(point.key, tangents)

    def _gradient(self, point: Point) -> Array:
        point.asked = True
        if point.gradient is None:
            self._first_order(point)
        assert point.gradient is not None
        return point.gradient

    def _first_order(self, point: Point) -> None:
        """Value and gradient; with a graph for products where there were some at the points before."""
        second = self._points.are_products_likely(point)
        if (second or self._function.is_resident) and self._function.in_session(
            lambda held: self._gradient_in_session(held, point, second)
        ):
            return
        result = self._stateless("value_and_grad", point)
        self._learn(point, _named(result.outputs), list(result.gradients.values()))

    def _gradient_in_session(self, held: Held, point: Point, second: bool) -> bool:
        value, gradients = held.value_and_gradient(point.key, self._packing.named(point.x), second)
        self._learn(point, {"": value}, gradients)
        return True

    def _second_order(self, point: Point) -> None:
        result = self._stateless("hessian", point, return_outputs=True, allow_unused=True)
        self._learn(point, _named(result.outputs), list(result.gradients.values()))
        variables = self._packing.variables
        found = np.zeros((self._packing.size, self._packing.size))
        blocks = iter(result.hessian.values())
        for row in variables:
            for column in variables:
                block = next(blocks)
                if block is not None:
                    place = slice(row.start, row.start + row.count), slice(column.start, column.start + column.count)
                    found[place] = block.reshape(row.count, column.count)
        point.hessian = found

    def _learn(self, point: Point, outputs: Mapping[str, Array], gradients: Sequence[Array | None]) -> None:
        """Takes value and gradient from an answer, where they are not known: what was told once stays."""
        unused = [one.key for one, g in zip(self._packing.variables, gradients, strict=True) if g is None]
        if unused:
            raise errors.UnusedInput(
                f"model {self._function.model.name!r}: the function does not depend on "
                f"{', '.join(map(repr, unused))}, which varies; leave it out of wrt"
            )
        if point.value is None:
            point.value = self._number(outputs)
        if point.gradient is None:
            point.gradient = self._packing.joined(gradients)

    # ---- residuals

    def residuals(self, x: Any) -> Array:
        """The outputs at x, raveled, float64 [m]; without a loss, `target` (or `targets`, by output) is subtracted."""
        point = self._at(x)
        if point.residuals is None:
            take_residuals(self._function, point, self._evaluate(point), self._wanted)
        assert point.residuals is not None
        return point.residuals.copy()

    def jacobian(self, x: Any) -> Array:
        """The dense Jacobian of the residuals at x, float64 [m, n]; the residuals come along.

        Raises ResultTooLarge, before anything is computed; then use `jacobian_operator`.
        """
        point = self._at(x)
        if point.jacobian is None:
            result = self._stateless("jacobian", point, return_outputs=True, allow_unused=True)
            take_residuals(self._function, point, _named(result.outputs), self._wanted)
            point.jacobian = matrix(self._function.model.name, point, self._packing, result.jacobian)
        return point.jacobian.copy()

    def jacobian_operator(self, x: Any) -> Any:
        """The Jacobian at x as a scipy.sparse.linalg.LinearOperator [m, n]: each product is a call. For large problems.

            least_squares(o.residuals, o.x0, jac=o.jacobian_operator, tr_solver="lsmr")

        Raises ImportError without scipy; from its products OrderUnavailable, where the model has no JVP.
        """
        point = self._at(x)
        if point.residuals is None:
            take_residuals(self._function, point, self._evaluate(point), self._wanted)
        return operator(self._function, point, self._packing)

    # ---- calls

    def _number(self, outputs: Mapping[str, Array]) -> float:
        value = outputs[number_among(self._function.model.name, outputs)]
        return float(np.asarray(value, np.float64).reshape(()))

    def _at(self, x: Any) -> Point:
        # A copy: solvers change their x in place.
        return self._points.at(self._packing.vector(x))

    def _stateless(self, method: str, point: Point, *arguments: Any, **options: Any) -> Any:
        if method != "evaluate":
            options["wrt"] = self._packing.wrt
        return self._function.stateless(method, self._packing.named(point.x), *arguments, **options)

    def _evaluate(self, point: Point) -> Mapping[str, Array]:
        if self._function.is_resident:
            found = self._function.in_session(lambda held: held.evaluate(self._packing.named(point.x)))
            if found is not None:
                return found if len(found) > 1 else {"": next(iter(found.values()))}
        return _named(self._stateless("evaluate", point))


def _copied(loss: Loss | None) -> Loss | None:
    if loss is not None:
        loss = copy.copy(loss)
        loss.tensors = {name: np.array(array) for name, array in loss.tensors.items()}
    return loss


def _named(outputs: Any) -> dict[str, Array]:
    """Outputs by name; the only one has none."""
    return outputs if isinstance(outputs, dict) else {"": outputs}
