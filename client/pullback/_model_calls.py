"""The stateless calls of a model, as coroutines, for both clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pullback._caller import Caller
from pullback._loss import Loss
from pullback._naming import structured, wants_one
from pullback._request import Common
from pullback._results import (
    Answer,
    HessianResult,
    HvpResult,
    JacobianResult,
    JvpResult,
    VjpResult,
    by_output,
    only_block,
)
from pullback._transport import Transport
from pullback_wire.v1 import gradient_service_pb2 as pb

if TYPE_CHECKING:
    from pullback._graph import ModelGraph

Wrt = str | Sequence[str] | None
Tensors = Mapping[str, Any] | None


class Hosted:
    """A model that a server hosts."""

    def __init__(self, transport: Transport, name: str, version: str = "") -> None:
        self._caller = Caller(transport, name, version)

    @property
    def name(self) -> str:
        """The model's name."""
        return self._caller.name

    @property
    def version(self) -> str:
        """The version that calls ask for; empty: the latest that is ready."""
        return self._caller.version

    def __repr__(self) -> str:
        version = f" version {self.version}" if self.version else ""
        return f"<{type(self).__name__} {self.name!r}{version} at {self._caller.target}>"


class ModelCalls(Hosted):
    """What can be asked of a model; see `pullback.RemoteModel` for the conventions."""

    async def graph(
        self, *, train: bool = False, max_nodes: int | None = None, timeout: float | None = None
    ) -> ModelGraph:
        """The autograd graph of the model: what a backward walks, of a sample that the server makes.

            model.graph().save("model.svg")

        train: as it is in train mode.
        max_nodes: None: the server's own limit, 2000; it sends 20000 at most.
        timeout: seconds; None: the client's default.

        Raises UnsupportedByModel where the model's inputs declare no shapes, or no sample made of them makes it run.
        """
        from pullback._graph import model_graph

        return model_graph(self._caller.name, await self._caller.graph(train, max_nodes, timeout))

    async def evaluate(
        self,
        inputs: Any,
        *,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """f(x), without derivatives."""
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("Evaluate", common) as draft:
            await draft.fill(inputs)
            return await self._caller.ask(
                draft, pb.EvaluateResponse, timeout, lambda m, answer: answer.outputs(m.outputs)
            )

    async def vjp(
        self,
        inputs: Any,
        cotangents: Any = None,
        *,
        wrt: Wrt = None,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        allow_unused: bool = False,
        batched: bool = False,
        max_norm: float | None = None,
        return_outputs: bool = True,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> VjpResult:
        """The vector-Jacobian product: (outputs, Jᴴv), Jᴴv in torch's convention for complex numbers.

            outputs, grads = model.vjp(x, v)

        cotangents: v. One array for a function of one output, a tuple in the outputs' order or a mapping by name for
            several (None, or absent: not pulled back), each of its output's shape and dtype. None at all means 1, for
            a function whose only differentiable output is a real scalar.
        batched: each cotangent has a leading axis of extent K more, and so has each gradient (is_grads_batched).
        max_norm: the gradients are scaled by min(1, max_norm / (norm + 1e-6)), norm being the 2-norm over all of
            them, which the result has as `.norm`.

        Raises BadCotangent, MissingCotangent; ResultTooLarge for more cotangents than the server takes.
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeVjp", common) as draft:
            await draft.fill(inputs)
            await draft.cotangents(cotangents)
            return await self._caller.vjp(
                draft,
                wrt,
                lambda named: structured(named, wrt, draft.inputs),
                allow_unused=allow_unused,
                batched=batched,
                max_norm=max_norm,
                return_outputs=return_outputs,
                timeout=timeout,
            )

    async def value_and_grad(
        self,
        inputs: Any,
        *,
        wrt: Wrt = None,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        allow_unused: bool = False,
        max_norm: float | None = None,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> VjpResult:
        """A real scalar function's value and gradient: (value, dict of gradients by name).

            value, grads = model.value_and_grad(x, target=t, loss="cross_entropy", wrt=["x", "fc1.*"])

        value is a 0-d array; the gradients are always a dict by name. max_norm and `.norm`: see `vjp`.

        Raises MissingCotangent when the function is not one real scalar.
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeVjp", common) as draft:
            await draft.fill(inputs)
            return await self._caller.vjp(
                draft,
                wrt,
                dict,
                allow_unused=allow_unused,
                batched=False,
                max_norm=max_norm,
                return_outputs=True,
                timeout=timeout,
            )

    async def jvp(
        self,
        inputs: Any,
        tangents: Any,
        *,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        return_outputs: bool = True,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> JvpResult:
        """The Jacobian-vector product: (outputs, J t).

        tangents: t, passed as the inputs are (None in a tuple stands still), or a mapping by name, which may name
            parameters; each of the shape and dtype of what it moves. What has none stands still.

        J t has the structure of the outputs, with None for an output that is not differentiable.

        Raises OrderUnavailable where the model does not promise it (`info.forward_mode`).
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeJvp", common) as draft:
            await draft.fill(inputs)
            draft.tangents(tangents)
            if not return_outputs:
                draft.omit_outputs()
            return await self._caller.ask(
                draft,
                pb.ComputeJvpResponse,
                timeout,
                lambda m, answer: JvpResult(
                    answer.outputs(m.outputs, return_outputs), by_output(answer.named(m.tangents, "tangents"))
                ),
            )

    async def hvp(
        self,
        inputs: Any,
        tangents: Any,
        cotangents: Any = None,
        *,
        wrt: Wrt = None,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        allow_unused: bool = False,
        cotangent_derivatives: bool = False,
        return_outputs: bool = True,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> HvpResult:
        """The derivative of a VJP along tangents; for a scalar function H t, the Hessian-vector product.

            result = model.hvp(x, t); result.hvps

        With g(x, v) = Jᴴv over all of wrt: (outputs, gradients = g, hvps = ∂Re⟨g, t⟩/∂x for all of wrt with mixed
        terms, cotangent_derivatives = ∂Re⟨g, t⟩/∂v = J t).

        tangents: t, as for `jvp`. wrt, when None, includes what they name beyond the inputs; results are a dict then.
        cotangents: v, as for `vjp`.
        cotangent_derivatives: whether they are computed.

        Raises OrderUnavailable where no second order is promised (`info.max_order`).
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeHvp", common) as draft:
            await draft.fill(inputs)
            moved = draft.tangents(tangents)
            await draft.cotangents(cotangents)
            if wrt is None:
                wrt = draft.wrt_with_tangents(moved)
            draft.wrt(wrt, allow_unused)
            draft.message.return_cotangent_derivatives = cotangent_derivatives
            if not return_outputs:
                draft.omit_outputs()

            def read(m: pb.ComputeHvpResponse, answer: Answer) -> HvpResult:
                return HvpResult(
                    answer.outputs(m.outputs, return_outputs),
                    structured(answer.named(m.gradients, "gradients"), wrt, draft.inputs),
                    structured(answer.named(m.hvps, "hvps"), wrt, draft.inputs),
                    by_output(answer.named(m.cotangent_derivatives, "cotangent_derivatives"))
                    if cotangent_derivatives
                    else None,
                )

            return await self._caller.ask(draft, pb.ComputeHvpResponse, timeout, read)

    async def jacobian(
        self,
        inputs: Any,
        *,
        wrt: Wrt = None,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        allow_unused: bool = False,
        return_outputs: bool = False,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """The dense Jacobian: J[i..., j...] = ∂y[i...]/∂x[j...], of shape y.shape + x.shape.

        One array for one differentiable output by one array (a single array passed, or wrt one name); else a dict by
        (output, wrt). return_outputs=True gives the pair JacobianResult(outputs, jacobian).

        Raises ResultTooLarge (before anything is computed), ComplexUnsupported.
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeJacobian", common) as draft:
            await draft.fill(inputs)
            draft.wrt(wrt, allow_unused)
            if not return_outputs:
                draft.omit_outputs()

            def read(m: pb.ComputeJacobianResponse, answer: Answer) -> Any:
                outputs = answer.outputs(m.outputs, return_outputs)
                jacobian = only_block(answer.blocks(m.blocks), wants_one(wrt, draft.inputs))
                return JacobianResult(outputs, jacobian) if return_outputs else jacobian

            return await self._caller.ask(draft, pb.ComputeJacobianResponse, timeout, read)

    async def hessian(
        self,
        inputs: Any,
        *,
        wrt: Wrt = None,
        loss: str | Loss | None = None,
        target: Any = None,
        targets: Tensors = None,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        allow_unused: bool = False,
        return_outputs: bool = False,
        result_dtype: Any = None,
        detect_anomaly: bool = False,
        timeout: float | None = None,
    ) -> Any:
        """The dense Hessian of a real scalar function: H[i..., j...] = ∂²y/∂x[i...]∂x[j...], of shape 2 x.shape.

        One array for one array (a single array passed, or wrt one name); else a dict by (wrt, wrt).
        return_outputs=True gives the triple HessianResult(outputs, gradients, hessian), as Newton's method wants it.

        Raises ResultTooLarge (before anything is computed), ComplexUnsupported, OrderUnavailable; MissingCotangent
        when the function is not one real scalar.
        """
        common = Common(loss, target, targets, parameters, train, seed, result_dtype, detect_anomaly, timeout)
        with self._caller.draft("ComputeHessian", common) as draft:
            await draft.fill(inputs)
            draft.wrt(wrt, allow_unused)
            if not return_outputs:
                draft.omit_outputs()

            def read(m: pb.ComputeHessianResponse, answer: Answer) -> Any:
                outputs = answer.outputs(m.outputs, return_outputs)
                gradients = answer.named(m.gradients, "gradients")
                hessian = only_block(answer.blocks(m.blocks), wants_one(wrt, draft.inputs))
                if not return_outputs:
                    return hessian
                return HessianResult(outputs, structured(gradients, wrt, draft.inputs), hessian)

            return await self._caller.ask(draft, pb.ComputeHessianResponse, timeout, read)
