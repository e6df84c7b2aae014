"""Commands and their options."""

from __future__ import annotations

import argparse
import os
from typing import Any

import pullback
from pullback._cli import bench, derivatives, hosting, top
from pullback._cli.connecting import DEFAULT_TARGET
from pullback._cli.options import add_function, add_inputs, add_model, add_vectors
from pullback._cli.usage import callers, count, seconds, shape
from pullback._cli.writing import output_file

_DESCRIPTION = (
    "Asks a Pullback server what it hosts and how it is, changes what it hosts, and computes derivatives there."
)
_GROUPS: dict[str, dict[str, str]] = {
    "derivatives": {
        "evaluate": "a model's outputs",
        "grad": "its value and gradients: a vector-Jacobian product",
        "jvp": "a Jacobian-vector product",
        "hvp": "a Hessian-vector product",
        "jacobian": "the dense Jacobian",
        "hessian": "the dense Hessian of a scalar",
    },
    "looking": {
        "models": "list the hosted models",
        "describe": "show a model's signature",
        "graph": "draw a model's autograd graph",
        "ping": "ask whether the server serves, and how fast",
        "top": "watch a server: calls, times, queue, workers",
        "bench": "measure calls per second and how long they take",
    },
    "administering": {
        "load": "load a model from the server's repository, or anew",
        "unload": "take a model out of service",
        "upload": "make a new version of a model with other weights",
    },
}
_EXAMPLES = {
    "evaluate": "pullback evaluate classifier --input pixels=@digits.npy -o logits.npy",
    "grad": """pullback grad square --input 'x=[1,2,3]' --grad-output '[1,1,1]'
pullback grad mlp --input @x.npy --loss cross_entropy --loss-target @t.npy --wrt 'fc1.*' -o grads.npz
pullback grad energy --input x:float64=@- --json < positions.json""",
    "jvp": "pullback jvp square --input 'x=[1,2,3]' --tangent 'x=[1,0,0]'",
    "hvp": "pullback hvp energy --input x=@positions.npy --tangent x=@direction.npy -o hvp.npz",
    "jacobian": "pullback jacobian square --input 'x=[1,2,3]'",
    "hessian": "pullback hessian energy --input x=@positions.npy -o hessian.npz",
    "models": "pullback models --target gradients.example:8470 --tls",
    "describe": "pullback describe classifier --version 2",
    "graph": "pullback graph classifier --output classifier.svg",
    "ping": "pullback ping --target unix:/run/pullback.sock",
    "top": "pullback top --metrics http://gradients.example:9470\npullback top --once",
    "bench": "pullback bench classifier --rows 8 --concurrency 1,16,64 --seconds 3",
    "load": "PULLBACK_TOKEN=... pullback load classifier --version 3",
    "unload": "PULLBACK_TOKEN=... pullback unload classifier --version 2",
    "upload": "PULLBACK_TOKEN=... pullback upload classifier new.safetensors --version 3",
}
#: What of a command's usage is not an option.
_ARGUMENTS = {
    **dict.fromkeys((*_GROUPS["derivatives"], *_GROUPS["administering"], "describe", "graph", "bench"), "MODEL "),
    "upload": "MODEL FILE --version VERSION ",
}
_TENSORS = """
A tensor is NAME=@FILE, NAME=JSON or NAME=- (standard input); NAME= may be left
out where there is only one that it can be. Files are .npy, .npz, .safetensors and
JSON; @FILE:KEY is one of several arrays. Arrays keep the dtype that they have in a
file. JSON gets that of the model's signature, or what is asked for, as in
NAME:float64=JSON; "NaN", "Infinity" and "-Infinity" are numbers in it, and a
complex number is a pair [real, imaginary].
"""


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        print(f"pullback {pullback.__version__}")
        parser.exit()


def defaults() -> dict[str, Any]:
    """Of the options that count before the command as well as after it."""
    return {
        "target": os.environ.get("PULLBACK_TARGET") or DEFAULT_TARGET,
        "timeout": None,
        "token": None,
        "allow_plaintext_token": False,
        "json": False,
        "tls": False,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_server_name": None,
    }


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = argparse.ArgumentParser(
        prog="pullback",
        description=_overview(),
        epilog="`pullback COMMAND --help` has the options of each, and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="pullback [options] COMMAND ...",
    )
    _common(whole)
    whole.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND", required=True, help=argparse.SUPPRESS)
    for group in _GROUPS.values():
        for name, told in group.items():
            tensors = _TENSORS if group is _GROUPS["derivatives"] else ""
            made = commands.add_parser(
                name,
                prog=f"pullback {name}",
                usage=f"pullback {name} {_ARGUMENTS.get(name, '')}[options]",
                description=told[0].upper() + told[1:] + ".",
                epilog=f"{tensors}\nfor example:\n" + "\n".join(f"  {line}" for line in _EXAMPLES[name].splitlines()),
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
            made.set_defaults(parser=made, run=_RUNS.get(name, derivatives.run))
            (_derivative if tensors else _OPTIONS[name])(made, name)
            _common(made)
    return whole


def _overview() -> str:
    lines = [_DESCRIPTION, ""]
    for title, group in _GROUPS.items():
        lines += [f"{title}:", *(f"  {name:<10} {told}" for name, told in group.items()), ""]
    return "\n".join(lines[:-1])


def _common(made: argparse.ArgumentParser) -> None:
    """Options that count before the command as well as after it; hence suppressed where they are not given."""
    target = defaults()["target"]
    made.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON")
    server = made.add_argument_group("server")
    texts = {
        "--target": ("ADDRESS", f"address of the server [env PULLBACK_TARGET; now {target}]"),
        "--token": (
            "TOKEN",
            "what the server knows you by; others on this machine can read command lines, so rather set the "
            "environment variable [env PULLBACK_TOKEN]",
        ),
        "--tls-ca": ("FILE", "PEM certificates that vouch for the server [public ones]"),
        "--tls-cert": ("FILE", "this client's certificate, PEM"),
        "--tls-key": ("FILE", "this client's private key, PEM"),
        "--tls-server-name": ("NAME", "name that the server's certificate must carry"),
    }
    switches = {
        "--tls": "encrypt; implied by the other options of TLS",
        "--allow-plaintext-token": "send the token to another machine although nothing is encrypted",
    }
    for option, (metavar, told) in texts.items():
        server.add_argument(option, metavar=metavar, default=argparse.SUPPRESS, help=told)
    for option, told in switches.items():
        server.add_argument(option, action="store_true", default=argparse.SUPPRESS, help=told)
    server.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        default=argparse.SUPPRESS,
        help="longest a call may take [30; load 600, upload 3600]",
    )


def _derivative(made: argparse.ArgumentParser, name: str) -> None:
    add_model(made)
    add_inputs(made)
    add_vectors(made, name)
    add_function(made)
    if name != "evaluate":
        made.add_argument("--no-outputs", action="store_true", help="leave the outputs out")
    made.add_argument(
        "--output",
        "-o",
        type=output_file,
        metavar="FILE",
        help="write the arrays to a .npz, .npy, .safetensors or .json file: outputs by their names, derivatives as "
        "grad:NAME, jvp:NAME, hvp:NAME, jacobian:OUTPUT:NAME, hessian:NAME:NAME",
    )


def _nothing(made: argparse.ArgumentParser, name: str) -> None:
    pass


def _model(made: argparse.ArgumentParser, name: str) -> None:
    add_model(made)


def _graph(made: argparse.ArgumentParser, name: str) -> None:
    add_model(made)
    made.add_argument("--output", "-o", metavar="FILE", help="what to write: .svg, .png, .pdf or .dot [DOT on stdout]")
    made.add_argument("--mode", choices=("eval", "train"), default="eval", help="how the model runs [eval]")
    made.add_argument("--max-nodes", type=count, metavar="NODES", help="nodes at most [2000]")


def _top(made: argparse.ArgumentParser, name: str) -> None:
    made.add_argument(
        "--metrics",
        metavar="URL",
        help="the server's metrics port [http://, or https:// with TLS, HOST OF TARGET:9470]",
    )
    made.add_argument("--interval", type=seconds, default=1.0, metavar="SECONDS", help="between looks [1]")
    made.add_argument("--once", action="store_true", help="look once, print and end")


def _bench(made: argparse.ArgumentParser, name: str) -> None:
    add_model(made)
    made.add_argument("--method", choices=("vjp", "evaluate", "jvp", "hvp"), default="vjp", help="what is called [vjp]")
    made.add_argument(
        "--concurrency", type=callers, default=[1, 4, 16, 64], metavar="N,N", help="callers at once [1,4,16,64]"
    )
    made.add_argument("--seconds", type=seconds, default=5.0, metavar="SECONDS", help="for each number of callers [5]")
    made.add_argument("--warmup", type=_warmup, default=1.0, metavar="SECONDS", help="before each, not counted [1]")
    made.add_argument("--rows", type=count, metavar="N", help="rows of a call, along the model's batch axis [1]")
    made.add_argument(
        "--shape", type=shape, action="append", metavar="NAME=N,N", help="shape of an input [as declared, 1 where free]"
    )
    add_inputs(made)
    add_vectors(made, "bench")
    add_function(made)


def _warmup(text: str) -> float:
    return 0.0 if text in ("0", "0.0") else seconds(text)


def _load(made: argparse.ArgumentParser, name: str) -> None:
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--version", metavar="VERSION", help="[what the model's version policy picks]")


def _unload(made: argparse.ArgumentParser, name: str) -> None:
    made.add_argument("model", metavar="MODEL")
    made.add_argument("--version", metavar="VERSION", help="[all]")
    made.add_argument("--delete-uploads", action="store_true", help="also delete what was uploaded")


def _upload(made: argparse.ArgumentParser, name: str) -> None:
    made.add_argument("model", metavar="MODEL")
    made.add_argument("file", metavar="FILE", help="the weights, a safetensors file")
    made.add_argument("--version", required=True, metavar="VERSION", help="number of the version to create")
    made.add_argument("--architecture-version", metavar="VERSION", help="version whose code it gets [the latest]")


_OPTIONS = {
    "models": _nothing,
    "describe": _model,
    "graph": _graph,
    "ping": _nothing,
    "top": _top,
    "bench": _bench,
    "load": _load,
    "unload": _unload,
    "upload": _upload,
}
_RUNS = {
    "models": hosting.models,
    "describe": hosting.describe,
    "graph": hosting.graph,
    "ping": hosting.ping,
    "top": top.run,
    "bench": bench.run,
    "load": hosting.load,
    "unload": hosting.unload,
    "upload": hosting.upload,
}
