"""`pullback`: asks a server what it hosts and whether it is well."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pullback
from pullback._info import ModelInfo
from pullback._tables import columns, described

_DEFAULT_TARGET = "localhost:8470"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0 done, 1 failed (a sentence on stderr); exits 2 on bad usage."""
    arguments = _parser().parse_args(argv, argparse.Namespace(**_defaults()))
    try:
        with _connect(arguments) as client:
            run: Callable[[pullback.Client, argparse.Namespace], None] = arguments.run
            run(client, arguments)
        # Here rather than at exit, where a closed pipe could no longer be answered for.
        sys.stdout.flush()
    except BrokenPipeError:
        # `pullback models | head`: whoever read has read enough. Nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (pullback.PullbackError, OSError, ValueError) as error:
        print(f"pullback: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _connect(arguments: argparse.Namespace) -> pullback.Client:
    tls = None
    if arguments.tls or arguments.tls_ca or arguments.tls_cert or arguments.tls_key or arguments.tls_server_name:
        tls = pullback.TLS(
            ca=arguments.tls_ca,
            cert=arguments.tls_cert,
            key=arguments.tls_key,
            server_name=arguments.tls_server_name,
        )
    return pullback.connect(arguments.target, tls=tls, timeout=arguments.timeout, name="pullback-cli")


def _models(client: pullback.Client, arguments: argparse.Namespace) -> None:
    models = client.models()
    if arguments.json:
        _print_json([_summary(model) for model in models])
        return
    if not models:
        print(f"{client.target} hosts no models")
        return
    rows = [("MODEL", "VERSION", "STATE", "PARAMETERS", "DERIVATIVES", "DESCRIPTION")]
    for model in models:
        orders = "any order" if model.max_order is None else f"order {model.max_order}"
        forward = ", jvp" if model.forward_mode else ""
        rows.append(
            (
                model.name,
                model.version,
                model.state,
                f"{model.parameter_count:,}",
                orders + forward,
                model.description,
            )
        )
    print(columns(rows))


def _describe(client: pullback.Client, arguments: argparse.Namespace) -> None:
    info = client.model(arguments.model, arguments.version).info
    if arguments.json:
        _print_json(asdict(info))
    else:
        print(described(info))


def _ping(client: pullback.Client, arguments: argparse.Namespace) -> None:
    # The first opens the connection.
    client.ping()
    seconds = client.ping()
    if arguments.json:
        _print_json({"target": client.target, "serving": True, "seconds": seconds})
    else:
        print(f"{client.target} is serving: {seconds * 1e3:.2f} ms")


def _summary(model: ModelInfo) -> dict[str, Any]:
    """What `models` knows of a model: all but its parameters."""
    fields = asdict(model)
    del fields["parameters"]
    return fields


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds > 0:
        raise ValueError
    return seconds


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: Any) -> None:
        print(f"pullback {pullback.__version__}")
        parser.exit()


def _defaults() -> dict[str, Any]:
    return {
        "target": os.environ.get("PULLBACK_TARGET") or _DEFAULT_TARGET,
        "timeout": 30.0,
        "json": False,
        "tls": False,
        "tls_ca": None,
        "tls_cert": None,
        "tls_key": None,
        "tls_server_name": None,
    }


def _parser() -> argparse.ArgumentParser:
    target = _defaults()["target"]
    # Suppressed, so that an option counts before the command as well as after it.
    common = argparse.ArgumentParser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--target", help=f"address of the server [env PULLBACK_TARGET; now {target}]")
    common.add_argument("--timeout", type=_seconds, metavar="SECONDS", help="longest a call may take [30]")
    common.add_argument("--json", action="store_true", help="print JSON")
    tls = common.add_argument_group("encryption")
    tls.add_argument("--tls", action="store_true", help="encrypt; implied by the options below")
    tls.add_argument("--tls-ca", metavar="FILE", help="PEM certificates that vouch for the server [public ones]")
    tls.add_argument("--tls-cert", metavar="FILE", help="this client's certificate, PEM")
    tls.add_argument("--tls-key", metavar="FILE", help="this client's private key, PEM")
    tls.add_argument("--tls-server-name", metavar="NAME", help="name that the server's certificate must carry")

    parser = argparse.ArgumentParser(
        prog="pullback", description="Asks a Pullback server what it hosts and whether it is well.", parents=[common]
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    models = commands.add_parser("models", parents=[common], help="list the hosted models")
    models.set_defaults(run=_models)
    describe = commands.add_parser("describe", parents=[common], help="show a model's signature")
    describe.add_argument("model", metavar="MODEL")
    describe.add_argument("--model-version", dest="version", default=None, metavar="VERSION", help="[the latest]")
    describe.set_defaults(run=_describe)
    ping = commands.add_parser("ping", parents=[common], help="ask whether the server serves, and how fast")
    ping.set_defaults(run=_ping)
    return parser


if __name__ == "__main__":
    sys.exit(main())
