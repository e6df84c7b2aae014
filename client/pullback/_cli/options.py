"""Options that several commands share: which function, of what, differentiated how."""

from __future__ import annotations

import argparse
import math

from pullback._cli.given import cotangent, given, named
from pullback._cli.usage import dtype, names, pair, seed

#: Commands that take a cotangent, a tangent, a wrt, and leave to have it unused.
_COTANGENT = ("grad", "hvp", "bench")
_TANGENT = ("jvp", "hvp", "bench")
_WRT = ("grad", "hvp", "jacobian", "hessian", "bench")
_RESULT_DTYPES = ("float16", "bfloat16", "float32", "float64")


def add_model(made: argparse.ArgumentParser) -> None:
    """MODEL and its version."""
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--version", "--model-version", default=None, metavar="VERSION", help="[the latest]")


def add_inputs(made: argparse.ArgumentParser) -> None:
    """The inputs."""
    group = made.add_argument_group("inputs")
    group.add_argument("--input", "-i", type=given, action="append", metavar="NAME=VALUE", help="an input; repeatable")
    group.add_argument("--inputs", action="append", metavar="FILE", help="a file of inputs by name; repeatable")
    group.add_argument(
        "--dtype", type=dtype, metavar="DTYPE", help="of tensors given as JSON whose dtype the model does not say"
    )


def add_vectors(made: argparse.ArgumentParser, command: str) -> None:
    """Cotangents, tangents, wrt, as far as the command has them."""
    group = made.add_argument_group("derivative")
    if command in _COTANGENT:
        group.add_argument(
            "--grad-output", type=cotangent, action="append", metavar="[NAME=]VALUE",
            help="cotangent of an output, repeatable; 'ones': of all outputs, after a call that learns their shapes; a "
            "real scalar needs none",
        )  # fmt: skip
    if command in _TANGENT:
        group.add_argument(
            "--tangent", type=given, action="append", required=command != "bench", metavar="[NAME=]VALUE",
            help="direction in which an input or a parameter moves; repeatable",
        )  # fmt: skip
    if command in _WRT:
        group.add_argument(
            "--wrt", type=names, action="append", metavar="NAME,...",
            help="inputs and parameters to differentiate by, globs allowed; repeatable [every floating-point input]",
        )  # fmt: skip
    if command in _WRT and command != "bench":
        group.add_argument("--allow-unused", action="store_true", help="no error for what the outputs do not depend on")
    if command == "grad":
        group.add_argument(
            "--batched", action="store_true", help="cotangents have a leading axis: one gradient for each"
        )
        group.add_argument("--max-norm", type=_norm, metavar="NORM", help="scale the gradients down to this 2-norm")


def add_function(made: argparse.ArgumentParser) -> None:
    """What is differentiated."""
    group = made.add_argument_group("function")
    group.add_argument("--param", type=named, action="append", metavar="NAME=VALUE", help="used for a hosted parameter")
    group.add_argument("--loss", metavar="NAME", help="of torch.nn.functional, behind the model")
    group.add_argument(
        "--loss-target", type=given, action="append", metavar="[NAME=]VALUE", help="the loss's target; repeatable"
    )
    group.add_argument("--loss-option", type=pair, action="append", metavar="NAME=VALUE", help="e.g. reduction=sum")
    group.add_argument(
        "--loss-binding", type=pair, action="append", metavar="NAME=OUTPUT", help="which output is the loss's input"
    )
    group.add_argument("--train", action="store_true", help="in train mode")
    group.add_argument("--seed", type=seed, metavar="N", help="of random numbers that the call draws")
    group.add_argument("--result-dtype", choices=_RESULT_DTYPES, metavar="DTYPE", help=", ".join(_RESULT_DTYPES))
    group.add_argument(
        "--detect-anomaly", action="store_true", help="fail where NaN or infinity appears, and say where"
    )


def _norm(text: str) -> float:
    try:
        norm = float(text)
    except ValueError:
        norm = math.nan
    if not 0 < norm < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return norm
