"""`RemoteModel`: a hosted model, called on tensors, and its derivatives as stateless calls of one round trip each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pullback._caller import Caller
from pullback._info import ModelInfo
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
    from pullback._objective import Objective
    from pullback._session import Session
    from pullback._tensor import Tensor

Wrt = str | Sequence[str] | None
Tensors = Mapping[str, Any] | None


class RemoteModel:
    """A model that a server hosts, got from `Client.model`. Making one calls nobody. Picklable, safe in many threads.

    For y = f(x) with Jacobian J; with a loss, f is the loss of the model's outputs and its only output is "loss".

    Conventions of all methods
    --------------------------
    inputs: one array; a tuple (or a list that holds arrays) of several in the order of the model's code; or a mapping
        by name. None in a tuple or mapping leaves an optional one out. Arrays are numpy's, torch's (where torch is
        loaded), or anything numpy can read, of any layout and byte order; their dtype is kept. Python numbers and
        lists of them become float32, int64, bool or complex64, as in torch.
    Where inputs, cotangents or tangents are not passed by name, the model's signature is fetched once, to name them.

    loss: name of a loss of torch.nn.functional, or a `pullback.Loss` with options. target: its "target"; targets: any
        tensor arguments of it by name.
    parameters: values used instead of the hosted parameters of those names, for this call only.
    train: run as after module.train(). The hosted model does not change.
    seed: of the random numbers that the call draws, 0 to 2**64 - 1. In train mode one is drawn when none is given.
    result_dtype: float16, bfloat16, float32 or float64: the dtype in which real floating results come back.
    detect_anomaly: fail with NonFinite, naming the operation that made it, where a result is NaN or infinite. Slow,
        and not merged with other calls. `pullback.autograd.detect_anomaly()` does it for whole blocks.
    timeout: seconds for the call and its retries; None: the client's default; math.inf: no limit.
    wrt: what to differentiate with respect to: one name or a sequence of names and globs (*, ?, [..]) over inputs and
        parameters; a prefix "input:", "param:" or "target:" says which is meant. None: every floating-point or
        complex input.
    allow_unused: False: UnusedInput is raised for a wrt that the outputs do not depend on; True: None stands for it.

    Outputs: one array when there is one, else a dict by name; None with return_outputs=False.
    Derivatives: without wrt as the inputs were passed (an array, a tuple with None for what is not floating-point, or
        a dict); with wrt one name (no glob) one array; else a dict by name.
    Results are numpy arrays that are writable and own their memory.
    Where a version is replaced or unloaded while a program runs, named results (VjpResult and its like) say which one
        answered, in `.model_version` and `.model_revision`; bare arrays and dicts do not.

    Raises, beside what each method adds: TypeError and ValueError for what makes no request; BadName, BadTensor,
    BadCotangent, MissingCotangent, BadOption, ModelNotFound, LossNotFound, NotDifferentiable, OrderUnavailable,
    ModelError, Overloaded, OutOfMemory, DeadlineExceeded, Unavailable, ...: see `pullback.errors`.
    """

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
        return f"<RemoteModel {self.name!r}{version} at {self._caller.target}>"

    @property
    def info(self) -> ModelInfo:
        """The model's signature, with parameters.

        Asked for once and then kept, until an answer comes from another version; not kept while it is not ready.

        Raises ModelNotFound, VersionNotFound, or what any call raises.
        """
        return self._caller.info()

    def __call__(
        self,
        *args: Any,
        parameters: Tensors = None,
        train: bool = False,
        seed: int | None = None,
        max_order: int | None = None,
        detect_anomaly: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Runs the model in a session and keeps its graph there: y = model(x); y.backward().

        args, kwargs: the inputs, in the order and by the names of the model's code: Tensors, or arrays, which take no
            part in gradients. None leaves an optional one out.
        parameters: by name, Tensors or arrays, used instead of the hosted ones. Once `parameters()` were taken in the
            session, calls there use those, and their gradients are known; before, hosted parameters get none.
        train, seed: as for the other methods.
        max_order: the highest order of derivative that will be asked for; None: any. 1 lets attention use its fast
            kernels.
        detect_anomaly: as for the other methods; backwards through the graph that is made know the modules then.

        Returns a Tensor, or a dict of them by name where the model has several outputs.

        Raises what evaluate() raises; BadHandle for tensors of different sessions; SessionLost.
        """
        from pullback._remote_call import call_model

        return call_model(self._caller, args, kwargs, parameters, train, seed, max_order, detect_anomaly)

    def named_parameters(self, session: Session | None = None) -> Iterator[tuple[str, Tensor]]:
        """The parameters as Tensors that require grad, by name. The session's own: the hosted ones never change.

        From the first time on, model(x) in that session uses these, so that loss.backward() fills their `.grad`, which
        stays on the server until it is read, and changing them in place changes what the model computes there:

            with pb.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad
            model.zero_grad()

        session: None: that of the `with client.session():` around, else the client's own.
        """
        from pullback._remote_call import take_parameters

        yield from take_parameters(self._caller, session).items()

    def parameters(self, session: Session | None = None) -> Iterator[Tensor]:
        """As `named_parameters`, without the names."""
        for _, tensor in self.named_parameters(session):
            yield tensor

    def zero_grad(self, session: Session | None = None) -> None:
        """Sets `.grad` of the parameters taken in the session to None."""
        from pullback._remote_call import taken_parameters

        for tensor in taken_parameters(self._caller, session):
            tensor.grad = None

    def graph(self, *, train: bool = False, max_nodes: int | None = None, timeout: float | None = None) -> ModelGraph:
        """The autograd graph of the model: what a backward walks, of a sample that the server makes.

            model.graph().save("model.svg")

        train: as it is in train mode.
        max_nodes: None: the server's own limit, 2000; it sends 20000 at most.
        timeout: seconds; None: the client's default.

        Raises UnsupportedByModel where the model's inputs declare no shapes, or no sample made of them makes it run.
        """
        from pullback._graph import model_graph

        return model_graph(self.name, self._caller.graph(train, max_nodes, timeout))

    def evaluate(
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
        with self._caller.draft("Evaluate", inputs, common) as draft:
            return self._caller.ask(draft, pb.EvaluateResponse, timeout, lambda m, answer: answer.outputs(m.outputs))

    def vjp(
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
        with self._caller.draft("ComputeVjp", inputs, common) as draft:
            draft.cotangents(cotangents)
            return self._caller.vjp(
                draft,
                wrt,
                lambda named: structured(named, wrt, draft.inputs),
                allow_unused=allow_unused,
                batched=batched,
                max_norm=max_norm,
                return_outputs=return_outputs,
                timeout=timeout,
            )

    def value_and_grad(
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
        with self._caller.draft("ComputeVjp", inputs, common) as draft:
            return self._caller.vjp(
                draft,
                wrt,
                dict,
                allow_unused=allow_unused,
                batched=False,
                max_norm=max_norm,
                return_outputs=True,
                timeout=timeout,
            )

    def jvp(
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
        with self._caller.draft("ComputeJvp", inputs, common) as draft:
            draft.tangents(tangents)
            if not return_outputs:
                draft.omit_outputs()
            return self._caller.ask(
                draft,
                pb.ComputeJvpResponse,
                timeout,
                lambda m, answer: JvpResult(
                    answer.outputs(m.outputs, return_outputs), by_output(answer.named(m.tangents, "tangents"))
                ),
            )

    def hvp(
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
        with self._caller.draft("ComputeHvp", inputs, common) as draft:
            moved = draft.tangents(tangents)
            draft.cotangents(cotangents)
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

            return self._caller.ask(draft, pb.ComputeHvpResponse, timeout, read)

    def jacobian(
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
        with self._caller.draft("ComputeJacobian", inputs, common) as draft:
            draft.wrt(wrt, allow_unused)
            if not return_outputs:
                draft.omit_outputs()

            def read(m: pb.ComputeJacobianResponse, answer: Answer) -> Any:
                outputs = answer.outputs(m.outputs, return_outputs)
                jacobian = only_block(answer.blocks(m.blocks), wants_one(wrt, draft.inputs))
                return JacobianResult(outputs, jacobian) if return_outputs else jacobian

            return self._caller.ask(draft, pb.ComputeJacobianResponse, timeout, read)

    def hessian(
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
        with self._caller.draft("ComputeHessian", inputs, common) as draft:
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

            return self._caller.ask(draft, pb.ComputeHessianResponse, timeout, read)

    def objective(
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
        timeout: float | None = None,
    ) -> Objective:
        """The function as scipy.optimize wants one: of a flat float64 vector, with derivatives that share evaluations.

            o = model.objective({"x": start, "data": data}, wrt="x")
            found = scipy.optimize.minimize(o.fun, o.x0, jac=o.jac, hessp=o.hessp, method="trust-ncg")
            o.unpack(found.x)["x"]

        inputs: as of `vjp`. What `wrt` names of them and of the parameters varies, and starts there; the rest is fixed.

        Raises BadName for a wrt that names nothing, ValueError for one that cannot vary, PullbackError.
        """
        from pullback._objective import Objective

        return Objective(self, inputs, wrt, loss, target, targets, parameters, train, seed, timeout)
