"""RemoteModel's methods: names, structures of what goes in and what comes back, and what travels."""

import math
import pickle
import threading
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from tests.both_clients import Connect
from tests.unit.client_server import Fake, serving

import pullback as pb
from pullback_wire import GRADIENT_METHODS, encode_message
from pullback_wire.v1 import function_pb2, model_service_pb2, tensor_pb2
from pullback_wire.v1 import gradient_service_pb2 as wire

X = np.array([1.0, -2.0, 3.0])
V = np.array([0.5, 1.0, 2.0])


@pytest.fixture(scope="module")
def server() -> Iterator[Fake]:
    with serving(Fake()) as fake:
        yield fake


@pytest.fixture(scope="module")
def client(connect: Connect, server: Fake) -> Iterator[pb.Client]:
    with connect(server.target) as client:
        yield client


@pytest.fixture
def fake(server: Fake) -> Iterator[Fake]:
    server.seen.clear()
    server.raw = None
    yield server
    server.raw = None


def test_evaluate(client: pb.Client) -> None:
    np.testing.assert_array_equal(client.model("square").evaluate(X), X**2)
    outputs = client.model("pair").evaluate((X, 1))
    assert list(outputs) == ["double", "total"]
    assert outputs["total"].shape == ()


def test_results_are_writable_aligned_and_own_their_memory(client: pb.Client) -> None:
    outputs, gradient = client.model("square").vjp(X, V)
    for array in (outputs, gradient):
        assert array.flags.writeable and array.flags.aligned and array.flags.owndata


def test_vjp(client: pb.Client) -> None:
    outputs, gradient = client.model("square").vjp(X, V)
    np.testing.assert_array_equal(outputs, X**2)
    np.testing.assert_array_equal(gradient, 2 * X * V)


def test_vjp_without_outputs(client: pb.Client, fake: Fake) -> None:
    outputs, gradient = client.model("square").vjp(X, V, return_outputs=False)
    assert outputs is None
    assert gradient is not None
    assert fake.seen[-1].message.results.omit_outputs


def test_vjp_norm(client: pb.Client) -> None:
    square = client.model("square")
    assert square.vjp(X, V).norm is None
    clipped = square.vjp(X, V, max_norm=1.0)
    assert clipped.norm == pytest.approx(np.linalg.norm(2 * X * V))
    assert len(clipped) == 2
    batched = square.vjp(X, np.stack([V, 2 * V]), batched=True, max_norm=1.0)
    assert isinstance(batched.norm, np.ndarray) and batched.norm.shape == (2,)
    assert batched.gradients.shape == (2, 3)


def test_value_and_grad_with_a_loss(client: pb.Client, fake: Fake) -> None:
    loss = pb.Loss("mse_loss", reduction="sum", weight=[1.0, 2.0])
    value, gradients = client.model("square").value_and_grad(X, loss=loss, target=V, wrt=["x", "fc1.*"])
    assert float(value) == pytest.approx(((X**2 - V) ** 2).sum())
    assert list(gradients) == ["x"]
    message = fake.seen[-1].message
    assert message.function.loss.name == "mse_loss"
    assert message.function.loss.options["reduction"] == "sum"
    assert list(message.wrt) == ["x", "fc1.*"]
    weight = fake.seen[-1].tensors["targets"]["weight"]
    assert weight.dtype == np.float32


def test_jvp_and_hvp(client: pb.Client) -> None:
    square = client.model("square")
    outputs, tangent = square.jvp(X, V)
    np.testing.assert_array_equal(outputs, X**2)
    np.testing.assert_array_equal(tangent, 2 * X * V)
    result = square.hvp(X, V, X, cotangent_derivatives=True)
    np.testing.assert_array_equal(result.gradients, 2 * X * X)
    np.testing.assert_array_equal(result.hvps, 2 * X * V)
    np.testing.assert_array_equal(result.cotangent_derivatives, 2 * X * V)
    assert square.hvp(X, V).cotangent_derivatives is None


def test_hvp_along_a_parameter_differentiates_by_the_inputs_too(client: pb.Client, fake: Fake) -> None:
    result = client.model("square").hvp({"x": X}, {"x": V, "w": V})
    assert list(fake.seen[-1].message.wrt) == ["input:x", "w"]
    assert list(result.hvps) == ["x", "w"]


def test_jacobian_and_hessian(client: pb.Client) -> None:
    square = client.model("square")
    np.testing.assert_array_equal(square.jacobian(X), np.diag(2 * X))
    outputs, jacobian = square.jacobian(X, return_outputs=True)
    np.testing.assert_array_equal(outputs, X**2)
    assert jacobian.shape == (3, 3)
    assert list(square.jacobian({"x": X})) == [("output", "x")]
    np.testing.assert_array_equal(square.jacobian({"x": X}, wrt="x"), np.diag(2 * X))
    np.testing.assert_array_equal(square.hessian(X), 2 * np.eye(3))
    whole = square.hessian(X, return_outputs=True)
    np.testing.assert_array_equal(whole.gradients, 2 * X)
    assert float(whole.outputs) == (X**2).sum()
    assert list(square.hessian(X, wrt=["x"])) == [("x", "x")]
    blocks = client.model("pair").jacobian((X, 1), allow_unused=True)
    assert blocks == {("double", "x"): None, ("total", "x"): None}


def test_derivatives_have_the_structure_of_the_inputs(client: pb.Client) -> None:
    pair = client.model("pair")
    gradients = pair.vjp((X, 1), (X, None)).gradients
    assert isinstance(gradients, tuple) and len(gradients) == 2 and gradients[1] is None
    gradients = pair.vjp((X, 1, [1.0]), (X, 1.0), allow_unused=True).gradients
    assert isinstance(gradients, tuple) and gradients[1:] == (None, None)
    gradients = pair.vjp((X, None, [1.0]), (X,), allow_unused=True).gradients
    assert isinstance(gradients, tuple) and gradients[1:] == (None, None)
    gradients = pair.vjp({"x": X, "index": 1}, {"total": 1.0}).gradients
    assert list(gradients) == ["x"]
    assert isinstance(pair.vjp([X, np.array(1)], {"total": 1.0}).gradients, tuple)


def test_one_name_gives_one_array_and_a_glob_a_dict(client: pb.Client) -> None:
    pair = client.model("pair")
    assert pair.vjp((X, 1), (X,), wrt="w").gradients.shape == ()
    assert list(pair.vjp((X, 1), (X,), wrt=["w"]).gradients) == ["w"]
    assert list(pair.vjp((X, 1), (X,), wrt="w.*").gradients) == ["w.0", "w.1"]


def test_a_jvp_has_none_for_an_output_that_is_not_differentiable(client: pb.Client) -> None:
    tangents = client.model("pair").jvp((X, 1), (V,)).tangents
    np.testing.assert_array_equal(tangents["double"], 2 * V)
    assert tangents["total"] is None


def test_the_signature_is_asked_for_once_and_only_where_names_are_missing(client: pb.Client, fake: Fake) -> None:
    square = client.model("square")
    square.vjp({"x": X}, {"output": V})
    square.jvp({"x": X}, {"x": V})
    square.value_and_grad({"x": X}, loss="mse_loss", target=V)
    # With a loss the one output is called "loss".
    square.vjp({"x": X}, np.array(1.0), loss="mse_loss", target=V)
    assert set(fake.seen[-1].tensors["cotangents"]) == {"loss"}
    assert fake.calls("GetModel") == 0
    square.vjp(X, V)
    square.vjp(X, V)
    assert fake.calls("GetModel") == 1


def test_names_of_outputs_that_the_server_does_not_know(connect: Connect) -> None:
    fake = Fake()
    fake.outputs_known = False
    with serving(fake), connect(fake.target) as client:
        client.model("square").vjp(X, V)
        assert set(fake.seen[-1].tensors["cotangents"]) == {"output"}
        client.model("pair").vjp((X, 1), (None, V))
        assert set(fake.seen[-1].tensors["cotangents"]) == {"output_1"}


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda m: m.evaluate(X), "one input is given, model 'pair' takes 3: 'x', 'index', 'z' .optional."),
        (lambda m: m.evaluate((X, X, X, X)), "4 inputs are given"),
        (lambda m: m.evaluate([X, X, X, X]), "stacked"),
        (lambda m: m.vjp((X, 1), X), "one cotangent is given, the outputs are 'double', 'total'"),
        (lambda m: m.vjp((X, 1), (X, X, X)), "3 cotangents are given"),
        (lambda m: m.jvp((X, 1), X), "one tangent is given for the inputs 'x', 'index'"),
        (lambda m: m.jvp({"x": X, "index": 1}, (X,)), "by position"),
        (lambda m: m.evaluate((X, 1), loss=pb.Loss("mse_loss", weight=X), targets={"weight": X}), "both"),
        (lambda m: m.evaluate((X, 1), loss="mse_loss", target=X, targets={"target": X}), "both"),
    ],
)
def test_names_that_positions_do_not_tell(client: pb.Client, fake: Fake, call: Any, sentence: str) -> None:
    with pytest.raises(pb.errors.BadName, match=sentence) as caught:
        call(client.model("pair"))
    assert caught.value.reason == "BAD_NAME"
    assert isinstance(caught.value, ValueError)
    assert fake.calls("Evaluate") + fake.calls("ComputeVjp") + fake.calls("ComputeJvp") == 0


def test_a_wrong_name_makes_the_signature_be_asked_for_again(client: pb.Client, fake: Fake) -> None:
    square = client.model("square")
    with pytest.raises(pb.errors.BadName):
        square.evaluate((X, X))
    square.evaluate(X)
    assert fake.calls("GetModel") == 2


def test_parameters_mode_seed_and_result_dtype_travel(client: pb.Client, fake: Fake) -> None:
    square = client.model("square", version=1)
    square.evaluate({"x": X}, parameters={"w": V, "b": None}, train=True, seed=7, result_dtype="bfloat16")
    message = fake.seen[-1].message
    assert message.function.model == "square" and message.function.version == "1"
    assert message.function.mode == function_pb2.MODE_TRAIN
    assert message.function.seed == 7
    assert message.results.dtype == tensor_pb2.DTYPE_BFLOAT16
    assert list(fake.seen[-1].tensors["parameters"]) == ["w"]


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype(np.float16), np.dtype(">f2")])
def test_names_of_a_result_dtype(client: pb.Client, fake: Fake, dtype: Any) -> None:
    client.model("square").evaluate({"x": X}, result_dtype=dtype)
    assert fake.seen[-1].message.results.dtype == tensor_pb2.DTYPE_FLOAT16
    client.model("square").evaluate({"x": X}, result_dtype=ml_dtypes.bfloat16)
    assert fake.seen[-1].message.results.dtype == tensor_pb2.DTYPE_BFLOAT16


def test_a_seed_is_drawn_in_train_mode_alone(client: pb.Client, fake: Fake) -> None:
    square = client.model("square")
    for _ in range(2):
        square.evaluate({"x": X}, train=True)
    seeds = [seen.message.function.seed for seen in fake.seen]
    assert all(seen.message.function.HasField("seed") for seen in fake.seen)
    assert seeds[0] != seeds[1]
    square.evaluate({"x": X})
    assert not fake.seen[-1].message.function.HasField("seed")


@pytest.mark.parametrize(
    ("call", "kind", "sentence"),
    [
        (lambda m: m.evaluate({"x": X}, seed=-1), ValueError, "seed is -1"),
        (lambda m: m.evaluate({"x": X}, seed=2**64), ValueError, "seed is"),
        (lambda m: m.evaluate({"x": X}, result_dtype="int32"), ValueError, "result_dtype is 'int32', expected one of"),
        (lambda m: m.evaluate({"x": X}, result_dtype="blue"), ValueError, "result_dtype"),
        (lambda m: m.evaluate({"x": X}, timeout=0), ValueError, "timeout is 0"),
        (lambda m: m.evaluate({"x": X}, timeout=math.nan), ValueError, "timeout is nan"),
        (lambda m: m.evaluate({1: X}), TypeError, "inputs has a key 1"),
        (lambda m: m.evaluate({"x": X}, parameters=[X]), TypeError, "parameters is a list"),
        (lambda m: m.vjp({"x": X}, {"output": X}, wrt=[]), ValueError, "wrt is empty"),
        (lambda m: m.vjp({"x": X}, {"output": X}, wrt=[3]), TypeError, "wrt holds 3"),
        (lambda m: m.vjp({"x": X}, {"output": X}, max_norm=0), ValueError, "max_norm is 0"),
        (lambda m: m.vjp({"x": X}, {"output": X}, max_norm=math.inf), ValueError, "max_norm is inf"),
        (lambda m: m.evaluate({"x": X}, loss=pb.Loss("mse_loss", beta=math.inf)), ValueError, "beta"),
        (lambda m: m.evaluate({"x": X}, loss=pb.Loss("mse_loss", beta={})), TypeError, "beta=. is a dict"),
        (lambda m: m.evaluate({"x": X}, loss=3), TypeError, "a loss is named"),
    ],
)
def test_arguments_that_make_no_request(
    client: pb.Client, fake: Fake, call: Any, kind: type[Exception], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        call(client.model("square"))
    assert not fake.seen


def test_infinite_and_absurd_timeouts_mean_no_limit(client: pb.Client) -> None:
    for timeout in (math.inf, 1e15):
        client.model("square").evaluate({"x": X}, timeout=timeout)


def test_loss_options() -> None:
    loss = pb.Loss(
        "cross_entropy", ignore_index=-100, reduction="sum", log_target=True, weight=np.float64([1, 2]), other=None,
        bindings={"input": "logits"},
    )  # fmt: skip
    message = loss.message()
    assert dict(message.options.items()) == {"ignore_index": -100.0, "reduction": "sum", "log_target": True}
    assert message.options["log_target"] is True
    assert dict(message.bindings) == {"input": "logits"}
    assert loss.tensors["weight"].dtype == np.float64
    assert repr(loss) == (
        "Loss('cross_entropy', bindings={'input': 'logits'}, ignore_index=-100.0, reduction='sum', log_target=True, "
        "weight=<float64[2]>)"
    )


def test_info(client: pb.Client) -> None:
    info = client.model("pair").info
    assert info.versions == ("1", "2") and info.state == "ready" and info.max_order is None and info.forward_mode
    assert str(info.inputs[0]) == "x: float64[n]"
    assert str(info.inputs[2]) == "z: any[...] (optional)"
    assert str(info.parameters[0]) == "w: float32[3]"
    assert str(info.losses[0]) == "mse_loss(input, target, [weight], reduction=)"
    assert repr(info) == (
        "<ModelInfo 'pair' version 2: (x: float64[n], index: any[...], z: any[...] (optional)) -> "
        "(double: any[...], total: any[...]), 3 parameters>"
    )
    assert [model.name for model in client.models()] == ["echo", "pair", "square"]


def _answer(**fields: Any) -> bytes:
    return encode_message(wire.ComputeVjpResponse(**fields), ())


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        (b"\xff\xff\xff", "cannot be read"),
        (_answer(), "outputs are missing"),
        (_answer(outputs=[tensor_pb2.Tensor(name="output", dtype=12, shape=[2])]), "payload"),
        (
            encode_message(
                wire.ComputeVjpResponse(outputs=[tensor_pb2.Tensor(name="output", dtype=12, shape=[2])]), [b"123"]
            ),
            "needs 8 bytes",
        ),
        (
            encode_message(
                wire.ComputeVjpResponse(
                    outputs=[tensor_pb2.Tensor(name="output", dtype=12, shape=[1])],
                    gradients=[wire.Gradient(name="x")],
                ),
                [b"1234"],
            ),
            r"gradients\[0\].value is missing",
        ),
        (
            encode_message(
                wire.ComputeVjpResponse(outputs=[tensor_pb2.Tensor(name="output", dtype=12, shape=[1])]), [b"1234"]
            ),
            "one derivative was asked for, the server sent none",
        ),
        (
            encode_message(
                wire.ComputeVjpResponse(
                    outputs=[tensor_pb2.Tensor(name="output", dtype=12, shape=[1])],
                    gradients=[wire.Gradient(name="x", unused=True)],
                ),
                [b"1234", b"stray"],
            ),
            "belongs to no tensor",
        ),
        (
            encode_message(
                wire.ComputeVjpResponse(
                    outputs=[
                        tensor_pb2.Tensor(name="output", dtype=12, shape=[1]),
                        tensor_pb2.Tensor(name="output", dtype=12, shape=[1], payload=1),
                    ],
                ),
                [b"1234", b"1234"],
            ),
            "a name twice",
        ),
    ],
)
def test_an_answer_that_breaks_the_contract(client: pb.Client, fake: Fake, raw: bytes, sentence: str) -> None:
    square = client.model("square")
    assert square.info
    fake.raw = raw
    with pytest.raises(pb.errors.ProtocolError, match=sentence) as caught:
        square.vjp(X, V)
    assert isinstance(caught.value, RuntimeError)


def test_every_method_of_the_service_is_reachable(client: pb.Client, fake: Fake) -> None:
    square = client.model("square")
    square.evaluate(X), square.vjp(X, V), square.jvp(X, V), square.hvp(X, V), square.jacobian(X), square.hessian(X)
    assert {seen.method for seen in fake.seen} == {*GRADIENT_METHODS, "GetModel"}


class TestWhichVersionAnswered:
    """Named results say it; the signature is asked for anew when another version than its own answers."""

    @pytest.fixture(autouse=True)
    def afterwards(self, fake: Fake) -> Iterator[None]:
        yield
        fake.answers_as, fake.told = ("2", 0), {}

    def test_named_results_say_it_and_stay_tuples(self, client: pb.Client, fake: Fake) -> None:
        fake.answers_as = ("7", 3)
        square = client.model("square")
        results = {
            2: [square.vjp(X, V), square.value_and_grad(X, loss="mse_loss", target=V), square.jvp(X, V)],
            4: [square.hvp(X, V)],
            3: [square.hessian(X, return_outputs=True)],
        }
        results[2].append(square.jacobian(X, return_outputs=True))
        for length, ones in results.items():
            for one in ones:
                assert isinstance(one, tuple) and len(one) == length
                assert (one.model_version, one.model_revision) == ("7", 3)
                back = pickle.loads(pickle.dumps(one))
                assert type(back) is type(one) and back.model_revision == 3
        assert isinstance(square.evaluate(X), np.ndarray)
        assert pb.VjpResult(1, 2).model_version == "" and pb.VjpResult(1, 2).norm is None

    def test_a_signature_is_kept_until_another_version_answers(self, client: pb.Client, fake: Fake) -> None:
        square = client.model("square")
        square.evaluate(X)
        square.evaluate(X)
        assert fake.calls("GetModel") == 1
        fake.answers_as, fake.told = ("2", 1), {"revision": 1}
        square.evaluate(X)
        assert fake.calls("GetModel") == 2
        assert square.info.revision == 1
        square.evaluate(X)
        assert fake.calls("GetModel") == 2

    def test_a_call_by_position_is_not_another_call_after_a_replacement(self, client: pb.Client, fake: Fake) -> None:
        pair = client.model("pair")
        pair.evaluate((X, 1))
        specs = [tensor_pb2.TensorSpec(name=name, any_shape=True) for name in ("index", "x")]
        fake.answers_as, fake.told = ("3", 0), {"version": "3", "inputs": specs}
        with pytest.raises(pb.errors.BadName, match="replaced by version 3"):
            pair.evaluate((X, 1))
        pair.evaluate((1, X))
        assert list(fake.seen[-1].tensors["inputs"]) == ["index", "x"]
        pair.evaluate({"x": X, "index": 1})

    @pytest.mark.parametrize(
        ("state", "kind"),
        [("FAILED", pb.errors.ModelNotFound), ("UNLOADING", pb.errors.ModelNotFound), ("LOADING", pb.errors.NotReady)],
    )
    def test_a_model_that_is_not_ready(
        self, connect: Connect, server: Fake, fake: Fake, state: str, kind: type[Exception]
    ) -> None:
        fake.told = {
            "state": model_service_pb2.ModelState.Value(f"MODEL_STATE_{state}"),
            "state_reason": "for a reason", "inputs": [], "outputs": [], "parameters": [],
        }  # fmt: skip
        with connect(server.target, retry=pb.RetryPolicy(attempts=1)) as client:
            square = client.model("square")
            assert square.info.state == state.lower()
            assert {one.state for one in client.models()} == {state.lower()}
            assert "for a reason" in repr(square.info)
            with pytest.raises(kind, match=f"'square' version 2 cannot be called, it is {state.lower()}: for a reason"):
                square.vjp(X, V)
            fake.told = {}
            np.testing.assert_array_equal(square.vjp(X, V).outputs, X**2)

    def test_a_model_that_is_being_loaded_is_waited_for(self, client: pb.Client, fake: Fake) -> None:
        fake.told = {"state": model_service_pb2.MODEL_STATE_LOADING}
        ready = threading.Timer(0.3, fake.told.clear)
        ready.start()
        try:
            np.testing.assert_array_equal(client.model("square").evaluate(X), X**2)
        finally:
            ready.join()
        assert fake.calls("GetModel") == 2
