"""Triton's own client against a server: what its examples do, and gradients. Needs `tritonclient[grpc]`.

    python tests/triton_client.py TARGET INPUT.npz OUTPUT.npz

INPUT has `x`, `v` and `target`. OUTPUT gets what came back, for somebody who has torch to look at.
"""

import asyncio
import queue
import sys

import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import aio
from tritonclient.utils import InferenceServerException

# Both have messages called `inference.ModelInferRequest`; one process can have both.
from pullback_wire.inference import open_inference_pb2 as ours

MODEL = "digits-conv"


def tensor(name: str, array: np.ndarray, datatype: str = "FP32") -> triton.InferInput:
    given = triton.InferInput(name, list(array.shape), datatype)
    given.set_data_from_numpy(array)
    return given


def main(target: str, source: str, destination: str) -> None:
    data = np.load(source)
    x, v, classes = data["x"], data["v"], data["target"]
    found: dict[str, np.ndarray] = {}
    assert triton.service_pb2.ModelInferRequest.DESCRIPTOR is not ours.ModelInferRequest.DESCRIPTOR
    with triton.InferenceServerClient(target) as client:
        about(client)
        found["infer"] = client.infer(MODEL, [tensor("image", x)], request_id="one").as_numpy("logits")
        result = client.infer(
            MODEL, [tensor("image", x)], outputs=[triton.InferRequestedOutput("logits")], request_id="7"
        )
        assert (result.get_response().id, result.get_response().model_version) == ("7", "1")
        result = client.infer(MODEL, [tensor("image", x)], priority=1, timeout=60_000_000, client_timeout=60)
        np.testing.assert_array_equal(result.as_numpy("logits"), found["infer"])
        found["async"] = asynchronously(client, x)
        found["stream"] = streamed(client, x)
        # A VJP, by the model's name and by a parameter.
        result = client.infer(f"{MODEL}@vjp", [tensor("image", x), tensor("grad_output:logits", v)])
        found["vjp"], found["vjp_output"] = result.as_numpy("grad:image"), result.as_numpy("logits")
        result = client.infer(
            MODEL, [tensor("image", x), tensor("grad_output:logits", v)], parameters={"pullback_vjp": True},
            outputs=[triton.InferRequestedOutput("grad:image")],
        )  # fmt: skip
        found["vjp_by_parameter"] = result.as_numpy("grad:image")
        assert result.as_numpy("logits") is None
        # The gradient of a loss, also with respect to a parameter of the model.
        parameters = {"loss": "cross_entropy", "loss:label_smoothing": 0.1, "wrt": "image,*.bias", "max_norm": 1e9}
        result = client.infer(
            f"{MODEL}@vjp", [tensor("image", x), tensor("target", classes, "INT64")], parameters=parameters
        )
        found["loss"], found["loss_grad"] = result.as_numpy("loss"), result.as_numpy("grad:image")
        found |= {
            output.name: result.as_numpy(output.name)
            for output in result.get_response().outputs
            if output.name.endswith(".bias")
        }
        found["norm"] = np.array(result.get_response().parameters["norm"].double_param)
        result = client.infer(
            f"{MODEL}@hvp",
            [tensor("image", x), tensor("grad_output:logits", v), tensor("tangent:image", np.ones_like(x))],
        )
        found["hvp"] = result.as_numpy("hvp:image")
        failures(client, x)
    found |= asyncio.run(with_asyncio(target, x, v))
    np.savez(destination, **found)


def about(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(f"{MODEL}@vjp")
    assert not client.is_model_ready("no_such_model")
    assert client.get_server_metadata().name == "pullback"
    metadata = client.get_model_metadata(MODEL)
    assert (metadata.name, list(metadata.versions)) == (MODEL, ["1"])
    assert [(one.name, one.datatype, list(one.shape)) for one in metadata.inputs] == [("image", "FP32", [-1, 8, 8])]
    metadata = client.get_model_metadata(f"{MODEL}@vjp", as_json=True)
    assert [one["name"] for one in metadata["inputs"]] == ["image", "grad_output:logits"]
    assert [one["name"] for one in metadata["outputs"]] == ["logits", "grad:image"]
    config = client.get_model_config(MODEL).config
    assert (config.name, config.input[0].name, list(config.input[0].dims)) == (MODEL, "image", [-1, 8, 8])
    index = client.get_model_repository_index()
    assert [(model.name, model.version, model.state) for model in index.models] == [(MODEL, "1", "READY")]


def asynchronously(client: triton.InferenceServerClient, x: np.ndarray) -> np.ndarray:
    """All rows, each in a call of its own, by callbacks."""
    answers: queue.Queue[tuple[int, object, object]] = queue.Queue()
    for row in range(len(x)):
        client.async_infer(
            MODEL, [tensor("image", x[row : row + 1])], lambda result, error, row=row: answers.put((row, result, error))
        )
    rows = {}
    for _ in range(len(x)):
        row, result, error = answers.get(timeout=60)
        assert error is None, error
        rows[row] = result.as_numpy("logits")
    return np.concatenate([rows[row] for row in range(len(x))])


def streamed(client: triton.InferenceServerClient, x: np.ndarray) -> np.ndarray:
    """All rows on one stream, a request that fails among them."""
    answers: queue.Queue[tuple[object, object]] = queue.Queue()
    client.start_stream(callback=lambda result, error: answers.put((result, error)))
    for row in range(len(x)):
        client.async_stream_infer(MODEL, [tensor("image", x[row : row + 1])], request_id=str(row))
    client.async_stream_infer(MODEL, [tensor("y", x)], request_id="wrong")
    client.async_stream_infer(f"{MODEL}@vjp", [tensor("image", x)], request_id="wrong as well")
    client.async_stream_infer(MODEL, [tensor("image", x)], request_id="all", enable_empty_final_response=True)
    rows = []
    for row in range(len(x)):
        result, error = answers.get(timeout=60)
        assert error is None, error
        assert result.get_response().id == str(row)
        assert result.get_response().parameters["triton_final_response"].bool_param
        rows.append(result.as_numpy("logits"))
    for part in ("has no input 'y'", "MISSING_COTANGENT"):
        result, error = answers.get(timeout=60)
        assert result is None
        assert part in str(error), error
    result, error = answers.get(timeout=60)
    assert error is None, error
    assert result.as_numpy("logits").shape == (len(x), 10)
    client.stop_stream()
    return np.concatenate(rows)


def failures(client: triton.InferenceServerClient, x: np.ndarray) -> None:
    for name, given, options, status, part in (
        ("no_such_model", [tensor("image", x)], {}, "NOT_FOUND", "no_such_model"),
        (MODEL, [tensor("image", x)], {"model_version": "9"}, "NOT_FOUND", "'9'"),
        (MODEL, [tensor("image", x[:, 0])], {}, "INVALID_ARGUMENT", "inputs[0].shape"),
        (MODEL, [tensor("image", x)], {"sequence_id": 3, "sequence_start": True}, "INVALID_ARGUMENT", "sequence"),
        (f"{MODEL}@vjp", [tensor("image", x)], {"parameters": {"wrd": "image"}}, "INVALID_ARGUMENT", "'wrt'"),
    ):
        try:
            client.infer(name, given, **options)
        except InferenceServerException as error:
            assert error.status() == f"StatusCode.{status}", error
            assert part in error.message(), error
        else:
            raise AssertionError(f"{name} was answered")
    try:
        client.get_system_shared_memory_status()
    except InferenceServerException as error:
        assert error.status() == "StatusCode.UNIMPLEMENTED", error
    else:
        raise AssertionError("there is shared memory")


async def with_asyncio(target: str, x: np.ndarray, v: np.ndarray) -> dict[str, np.ndarray]:
    async with aio.InferenceServerClient(target) as client:
        assert await client.is_server_ready()
        result = await client.infer(f"{MODEL}@vjp", [tensor("image", x), tensor("grad_output:logits", v)])

        async def requests():
            for number in range(3):
                yield {"model_name": MODEL, "inputs": [tensor("image", x)], "request_id": str(number)}

        last = None
        async for answer, error in client.stream_infer(requests()):
            assert error is None, error
            last = answer
        return {"aio_vjp": result.as_numpy("grad:image"), "aio_stream": last.as_numpy("logits")}


if __name__ == "__main__":
    main(*sys.argv[1:])
    print("ok")
