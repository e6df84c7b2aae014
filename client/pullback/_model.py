"""`RemoteModel`: a hosted model, called on tensors, and its derivatives as stateless calls of one round trip each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pullback._blocking import blocking
from pullback._info import ModelInfo
from pullback._loss import Loss
from pullback._model_calls import Hosted, ModelCalls, Tensors, Wrt

if TYPE_CHECKING:
    from pullback._objective import Objective
    from pullback._session import Session
    from pullback._tensor import Tensor


class RemoteModel(Hosted):
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

    @property
    def info(self) -> ModelInfo:
        """The model's signature, with parameters.

        Asked for once and then kept, until an answer comes from another version; not kept while it is not ready.

        Raises ModelNotFound, VersionNotFound, or what any call raises.
        """
        return self._caller.transport.run(self._caller.info())

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

    graph = blocking(ModelCalls.graph)
    evaluate = blocking(ModelCalls.evaluate)
    vjp = blocking(ModelCalls.vjp)
    value_and_grad = blocking(ModelCalls.value_and_grad)
    jvp = blocking(ModelCalls.jvp)
    hvp = blocking(ModelCalls.hvp)
    jacobian = blocking(ModelCalls.jacobian)
    hessian = blocking(ModelCalls.hessian)

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
