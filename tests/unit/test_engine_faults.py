"""Bad input: each cause has its reason, its field and a sentence with what was expected and what came."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pullback_server import spec
from pullback_server.faults import Fault
from pullback_server.hosting.loading import load_source
from pullback_wire import Reason

HERE = Path(__file__).parent
_spec = importlib.util.spec_from_file_location("engine_jobs", HERE / "engine_jobs.py")
assert _spec is not None and _spec.loader is not None
jobs = sys.modules.setdefault("engine_jobs", importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(jobs)

torch.set_num_threads(1)
Tensor = torch.Tensor

ZOO = {registration.name: registration for registration in load_source(str(HERE.parent / "zoo.py"))}


def real(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(scope="module")
def host() -> Any:
    names = ["cube", "square_sum", "mixed", "pair", "holomorphic", "modulus", "raises", "leaves", "no_tensor"]
    names += ["a_number", "detached", "half_used", "small", "tied", "words", "identity"]
    return jobs.Host(*(ZOO[name] for name in names))


X = {"x": real(2, 3)}


def test_unknown_model_and_version(host: Any) -> None:
    with jobs.refused(Reason.MODEL_NOT_FOUND, "'cubes'", "did you mean 'cube'", field="function.model"):
        host("evaluate", "cubes", X)
    with jobs.refused(Reason.VERSION_NOT_FOUND, "'7'", "'1'", field="function.version"):
        host("evaluate", "cube", X, version="7")
    host("evaluate", "cube", X, version="")


def test_input_names(host: Any) -> None:
    with jobs.refused(Reason.BAD_NAME, "needs the input 'y'", field="inputs[y]"):
        host("evaluate", "mixed", {"x": real(3)})
    with jobs.refused(Reason.BAD_NAME, "'scal'", "did you mean 'scale'", field="inputs[scal]"):
        host("evaluate", "mixed", {"x": real(3), "y": real(3), "scal": real()})
    job, tensors = jobs.make_job("evaluate", "cube", X)
    job.inputs = job.inputs * 2
    with jobs.refused(Reason.BAD_NAME, "twice", field="inputs[x]"):
        host.engine.run(job, tensors)


def test_parameters(host: Any) -> None:
    x = {"input": real(2, 3)}
    with jobs.refused(Reason.BAD_NAME, "did you mean '0.weight'", field="parameters[0.weigth]"):
        host("evaluate", "small", x, parameters={"0.weigth": real(5, 3)})
    with jobs.refused(Reason.BAD_TENSOR, "[5, 4]", "[5, 3]", field="parameters[0.weight].shape"):
        host("evaluate", "small", x, parameters={"0.weight": real(5, 4)})
    with jobs.refused(Reason.BAD_TENSOR, "float32", "float64", field="parameters[0.weight].dtype"):
        host("evaluate", "small", x, parameters={"0.weight": torch.zeros(5, 3)})
    with jobs.refused(Reason.BAD_NAME, "'first.weight'", field="parameters[second.weight]"):
        host("evaluate", "tied", X, parameters={"second.weight": real(3, 3)})


def test_declared_ranges() -> None:
    host = jobs.Host(ZOO["words"])
    for bad in (11, -1):
        with jobs.refused(Reason.VALUE_OUT_OF_RANGE, f"inputs[ids][1, 2] is {bad}", "0 to 10", field="inputs[ids]"):
            host("evaluate", "words", {"ids": torch.tensor([[0, 1, 2], [3, 4, bad]])})


@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "float16", "bfloat16", "float32", "bool"]
)
def test_ranges_of_every_dtype(dtype: str) -> None:
    host = jobs.host_function(lambda x: x, inputs={"x": spec(low=0, high=0.5 if dtype == "bool" else 3)})
    host("evaluate", "f", {"x": torch.zeros(2).to(getattr(torch, dtype))})
    host("evaluate", "f", {"x": torch.zeros(0).to(getattr(torch, dtype))})
    with jobs.refused(Reason.VALUE_OUT_OF_RANGE):
        host("evaluate", "f", {"x": torch.tensor([0, 100]).to(getattr(torch, dtype))})


def test_nan_is_in_every_range() -> None:
    host = jobs.host_function(lambda x: x, inputs={"x": spec(low=0, high=3)})
    host("evaluate", "f", {"x": torch.tensor([1.0, float("nan")])})
    with jobs.refused(Reason.VALUE_OUT_OF_RANGE):
        host("evaluate", "f", {"x": torch.tensor([float("nan"), 4.0])})


def test_wrt(host: Any) -> None:
    with jobs.refused(Reason.NOT_DIFFERENTIABLE, "int64", field="wrt[ids]"):
        host("vjp", "words", {"ids": torch.zeros(1, 2, dtype=torch.int64)}, wrt=["ids"])
    with jobs.refused(Reason.BAD_NAME, "'z'", field="wrt[z]"):
        host("vjp", "cube", X, wrt=["z"])
    with jobs.refused(Reason.BAD_NAME, "did you mean '0.weight'", field="wrt[param:0.weights]"):
        host("vjp", "small", {"input": real(2, 3)}, wrt=["param:0.weights"])
    with jobs.refused(Reason.NOT_DIFFERENTIABLE, "wrt names nothing", field="wrt"):
        host("vjp", "words", {"ids": torch.zeros(1, 2, dtype=torch.int64)}, wrt=[])


def test_cotangents(host: Any) -> None:
    with jobs.refused(Reason.MISSING_COTANGENT, "[2, 3]", field="cotangents"):
        host("vjp", "cube", X, wrt=["x"])
    with jobs.refused(Reason.MISSING_COTANGENT, "'wide'", "'narrow'"):
        host("vjp", "pair", {"x": real(1)}, wrt=["x"])
    with jobs.refused(Reason.BAD_COTANGENT, "[4]", "[2, 3]", field="cotangents[output].shape"):
        host("vjp", "cube", X, wrt=["x"], cotangents={"output": real(4)})
    with jobs.refused(Reason.BAD_COTANGENT, "[2]", "[]", field="cotangents[output].shape"):
        host("vjp", "square_sum", X, wrt=["x"], cotangents={"output": real(2)})
    with jobs.refused(Reason.BAD_COTANGENT, "float32", "float64", field="cotangents[output].dtype"):
        host("vjp", "cube", X, wrt=["x"], cotangents={"output": torch.zeros(2, 3)})
    with jobs.refused(Reason.BAD_COTANGENT, "complex128", "float64", "a complex tensor takes a complex one"):
        z = torch.zeros(2, dtype=torch.complex128)
        host("vjp", "holomorphic", {"z": z}, wrt=["z"], cotangents={"output": real(2)})
    with jobs.refused(Reason.MISSING_COTANGENT, "complex128"):
        host("vjp", "holomorphic", {"z": torch.zeros((), dtype=torch.complex128)}, wrt=["z"])
    with jobs.refused(Reason.BAD_NAME, "'outputs'", "did you mean 'output'", field="cotangents[outputs]"):
        host("vjp", "cube", X, wrt=["x"], cotangents={"outputs": real(2, 3)})
    job, tensors = jobs.make_job("vjp", "cube", X, wrt=["x"], cotangents={"output": real(2, 3)})
    job.cotangents = job.cotangents * 2
    with jobs.refused(Reason.BAD_NAME, "twice", field="cotangents[output]"):
        host.engine.run(job, tensors)


def test_a_scalar_of_one_element_needs_no_cotangent(host: Any) -> None:
    x = real(1, 1)
    torch.testing.assert_close(host("vjp", "cube", {"x": x}, wrt=["x"]).grads["x"], 3 * x**2)


def test_batched_cotangents(host: Any) -> None:
    common: dict[str, Any] = {"wrt": ["x"], "batched": True}
    with jobs.refused(Reason.RESULT_TOO_LARGE, "5 rows", "at most 4"):
        host("vjp", "cube", X, **common, cotangents={"output": real(5, 2, 3)}, max_cotangents=4)
    with jobs.refused(Reason.RESULT_TOO_LARGE, "99999999 rows"):
        host("vjp", "cube", {"x": real(0)}, **common, cotangents={"output": real(99999999, 0)})
    with jobs.refused(Reason.BAD_COTANGENT, "0 rows"):
        host("vjp", "cube", X, **common, cotangents={"output": real(0, 2, 3)})
    with jobs.refused(Reason.BAD_COTANGENT, "[2, 3]", "[2, 2, 3]", field="cotangents[output].shape"):
        host("vjp", "cube", X, **common, cotangents={"output": real(2, 3)})
    with jobs.refused(Reason.BAD_COTANGENT, "[]", field="cotangents[output].shape"):
        host("vjp", "square_sum", X, **common, cotangents={"output": real()})
    with jobs.refused(Reason.BAD_COTANGENT, "2 rows", "3", field="cotangents[narrow].shape"):
        host("vjp", "pair", {"x": real(2)}, **common, cotangents={"wide": real(3, 4), "narrow": real(2, 1)})
    with jobs.refused(Reason.BAD_COTANGENT, "no cotangents"):
        host("vjp", "square_sum", X, **common)


def test_tangents(host: Any) -> None:
    with jobs.refused(Reason.BAD_COTANGENT, "[3]", "[2, 3]", field="tangents[x].shape"):
        host("jvp", "cube", X, wrt=["x"], tangents={"x": real(3)})
    with jobs.refused(Reason.BAD_COTANGENT, "float32", field="tangents[x].dtype"):
        host("hvp", "cube", X, wrt=["x"], cotangents={"output": real(2, 3)}, tangents={"x": torch.zeros(2, 3)})
    with jobs.refused(Reason.BAD_NAME, "tangents[y]"):
        host("hvp", "cube", X, wrt=["x"], cotangents={"output": real(2, 3)}, tangents={"y": real(2, 3)})


def test_outputs_that_cannot_be_differentiated(host: Any) -> None:
    x = {"x": real(3)}
    with jobs.refused(Reason.NOT_DIFFERENTIABLE, "'cut'", "needs no grad", field="cotangents[cut]"):
        host("vjp", "detached", x, wrt=["x"], cotangents={"cut": real(3)})
    with jobs.refused(Reason.NOT_DIFFERENTIABLE, "int64", field="cotangents[rank]"):
        host("vjp", "detached", x, wrt=["x"], cotangents={"rank": torch.zeros(3, dtype=torch.int64)})
    hidden = jobs.host_function(lambda x: x.detach() * 2)
    for allow in (False, True):
        with jobs.refused(Reason.NOT_DIFFERENTIABLE, "'output'"):
            hidden("vjp", "f", {"x": real()}, wrt=["x"], allow_unused=allow)
    ranks = jobs.host_function(lambda x: x.argsort())
    with jobs.refused(Reason.NOT_DIFFERENTIABLE, "int64"):
        ranks("vjp", "f", x, wrt=["x"])


def test_what_is_unused_is_named_or_marked(host: Any) -> None:
    x = {"x": real(3), "y": real(2)}
    v = {"output": real(3)}
    for kind, more in (
        ("vjp", {"cotangents": v}),
        ("hvp", {"cotangents": v, "tangents": {"x": real(3)}}),
        ("jacobian", {}),
    ):
        with jobs.refused(Reason.UNUSED_INPUT, "'y'", "allow_unused", field="wrt[y]"):
            host(kind, "half_used", x, wrt=["x", "y"], **more)
        reply = host(kind, "half_used", x, wrt=["x", "y"], allow_unused=True, **more)
        if kind == "jacobian":
            assert reply.blocks["output", "y"] is None and reply.blocks["output", "x"] is not None
        else:
            assert reply.grads["y"] is None and reply.grads["x"] is not None
        if kind == "hvp":
            assert reply.hvps["y"] is None and reply.hvps["x"] is not None
    # Nothing is used at all, but the output could be differentiated by something else.
    with jobs.refused(Reason.UNUSED_INPUT, "'y'"):
        host("vjp", "half_used", x, wrt=["y"], cotangents=v)
    assert host("vjp", "half_used", x, wrt=["y"], cotangents=v, allow_unused=True).grads == {"y": None}
    reply = host(
        "hessian", "half_used", x, wrt=["y", "x"], loss="mse_loss", targets={"target": real(3)}, allow_unused=True
    )
    assert [key for key, block in reply.blocks.items() if block is None] == [("y", "y"), ("y", "x"), ("x", "y")]
    assert reply.grads["y"] is None


def test_an_output_that_does_not_depend_on_wrt_counts_nothing() -> None:
    """One output depends on x, the other only on the parameters: both are differentiable, as in torch."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(real(3))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"a": (x * self.weight).sum(), "b": self.weight.square().sum()}

    host = jobs.host_factory(Two)
    x = real(3)
    with jobs.refused(Reason.MISSING_COTANGENT):
        host("vjp", "f", {"x": x}, wrt=["x"])
    one = torch.ones((), dtype=torch.float64)
    reply = host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"a": one, "b": one})
    weight = dict(host.engine.find("f", "").parameters)["weight"]
    torch.testing.assert_close(reply.grads["x"], weight.detach())
    assert reply.grads["x"].shape == (3,)
    with jobs.refused(Reason.UNUSED_INPUT):
        host("vjp", "f", {"x": x}, wrt=["x"], cotangents={"b": one})
    assert not weight.requires_grad


def test_dense_derivatives_refuse_what_is_complex_or_large(host: Any) -> None:
    z = {"z": torch.zeros(2, dtype=torch.complex128)}
    for kind in ("jacobian", "hessian"):
        with jobs.refused(Reason.COMPLEX_UNSUPPORTED, "ComputeVjp", field="wrt[z]"):
            host(kind, "modulus", z, wrt=["z"])
    to_complex = jobs.host_function(lambda x: x * 1j)
    with jobs.refused(Reason.COMPLEX_UNSUPPORTED, "'output'"):
        to_complex("jacobian", "f", {"x": real(2)}, wrt=["x"])
    with jobs.refused(Reason.COMPLEX_UNSUPPORTED, "'output'"):
        to_complex("hessian", "f", {"x": real()}, wrt=["x"])
    with jobs.refused(Reason.RESULT_TOO_LARGE, str(36 * 8 + 48), "at most 300"):
        host("jacobian", "cube", X, wrt=["x"], max_result_bytes=300)
    host("jacobian", "cube", X, wrt=["x"], max_result_bytes=36 * 8 + 48)
    with jobs.refused(Reason.MISSING_COTANGENT, "[2, 3]"):
        host("hessian", "cube", X, wrt=["x"])


def test_a_hessian_that_is_too_large_is_refused_before_anything_is_computed() -> None:
    def never(x: Tensor) -> Tensor:
        raise AssertionError("the forward ran")

    host = jobs.host_function(never)
    with jobs.refused(Reason.RESULT_TOO_LARGE, str(8 * (100000**2 + 100000)), "at most 1000"):
        host("hessian", "f", {"x": real(100000)}, wrt=["x"], max_result_bytes=1000)


def test_other_results_that_are_too_large(host: Any) -> None:
    v = {"output": real(2, 3)}
    with jobs.refused(Reason.RESULT_TOO_LARGE, "96"):
        host("vjp", "cube", X, wrt=["x"], cotangents=v, max_result_bytes=95)
    host("vjp", "cube", X, wrt=["x"], cotangents=v, max_result_bytes=48, return_outputs=False)
    with jobs.refused(Reason.RESULT_TOO_LARGE):
        host("evaluate", "cube", X, max_result_bytes=47)


def test_the_models_own_exception(host: Any) -> None:
    for kind, more in (("evaluate", {}), ("vjp", {"wrt": ["x"]}), ("jvp", {"wrt": ["x"], "tangents": X})):
        with jobs.refused(Reason.MODEL_ERROR, "ValueError: no good: [2, 3]", "'raises'"):
            host(kind, "raises", X, **more)
        with jobs.refused(Reason.MODEL_ERROR, "SystemExit"):
            host(kind, "leaves", X, **more)
    with pytest.raises(Fault) as caught:
        host("evaluate", "raises", X)
    assert isinstance(caught.value.__cause__, ValueError)
    host("evaluate", "cube", X)


def test_a_backward_that_raises() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            raise KeyboardInterrupt("not today")

    host = (
        jobs.host_function(Broken.apply, inputs={"x": spec()})
        if False
        else jobs.host_function(lambda x: Broken.apply(x))
    )
    for batched in (False, True):
        v = real(2, 2) if batched else real(2)
        with jobs.refused(Reason.MODEL_ERROR, "KeyboardInterrupt: not today"):
            host("vjp", "f", {"x": real(2)}, wrt=["x"], cotangents={"output": v}, batched=batched)


def test_results_that_are_no_tensors(host: Any) -> None:
    with jobs.refused(Reason.MODEL_ERROR, "returned no tensor"):
        host("evaluate", "no_tensor", X)
    with jobs.refused(Reason.MODEL_ERROR, "a float", "'output_1'"):
        host("evaluate", "a_number", X)
    quantized = jobs.host_function(lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8))
    with jobs.refused(Reason.MODEL_ERROR, "cannot travel"):
        quantized("evaluate", "f", X)


def test_max_norm(host: Any) -> None:
    for bad in (-1.0, float("nan")):
        with jobs.refused(Reason.BAD_OPTION, field="max_norm"):
            host("vjp", "cube", X, wrt=["x"], cotangents={"output": real(2, 3)}, max_norm=bad)


def test_memory_that_runs_out(host: Any) -> None:
    greedy = jobs.host_function(lambda x: torch.empty(1 << 60, dtype=torch.uint8) * x)
    with jobs.refused(Reason.OUT_OF_MEMORY, "'f'"):
        greedy("evaluate", "f", {"x": real()})
