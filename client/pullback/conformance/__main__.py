"""`python -m pullback.conformance TARGET`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pullback._channel import TLS, Address
from pullback.conformance import _report
from pullback.conformance._check import Check, Finding, Verdict
from pullback.conformance._run import NotServing, checks, run

PASSED, FAILED, NOT_RUN, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing failed. 1: something did. 2: the checks could not be made, or of no model. 130: Ctrl-C."""
    parser = _parser()
    told = parser.parse_args(arguments)
    chosen = checks(told.only, told.skip)
    if told.list:
        _list(chosen, told.json)
        return PASSED
    if not told.target:
        parser.error("a target is needed, such as localhost:8470")
    if not chosen:
        parser.error("no check has such an id; --list shows them")
    findings: list[Finding] = []
    interrupted = False
    try:
        settings = {
            "models": told.model,
            "only": told.only,
            "skip": told.skip,
            "inputs": dict(_given(one) for one in told.inputs),
            "metadata": _metadata(told),
            "timeout": told.timeout,
            "patience": told.patience,
            **_tls(told),
        }
        for finding in run(told.target, **settings):
            findings.append(finding)
            if not told.json:
                print(_report.line(finding, told.reasons), flush=True)
    except (NotServing, OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return NOT_RUN
    except KeyboardInterrupt:
        interrupted = True
    if told.json:
        json.dump({**_report.as_json(told.target, findings), "interrupted": interrupted}, sys.stdout, indent=1)
        print()
    else:
        print(_report.summary(findings) + (", and then Ctrl-C" if interrupted else ""))
    if interrupted:
        return INTERRUPTED
    if any(finding.verdict is Verdict.FAIL for finding in findings):
        return FAILED
    of_models = [finding for finding in findings if finding.check.for_each_model]
    if of_models and not any(finding.verdict is Verdict.PASS for finding in of_models):
        # Of an empty server nothing is wrong, but whoever asks should not take that for a promise kept.
        print(f"{parser.prog}: no check of a model could be made; --reasons says why", file=sys.stderr)
        return NOT_RUN
    return PASSED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m pullback.conformance",
        description="Checks that a server keeps the contract of pullback.v1, whatever it is written in.",
    )
    parser.add_argument("target", nargs="?", help="where it listens, e.g. localhost:8470")
    parser.add_argument("--model", action="append", default=[], metavar="GLOB", help="models to ask (all)")
    parser.add_argument("--only", action="append", default=[], metavar="GLOB", help="ids of checks to make (all)")
    parser.add_argument("--skip", action="append", default=[], metavar="GLOB", help="ids of checks not to make")
    parser.add_argument(
        "--inputs",
        action="append",
        default=[],
        metavar="MODEL=FILE.npz",
        help="inputs by name, for a model whose signature does not tell enough",
    )
    parser.add_argument("--list", action="store_true", help="the checks, and what the contract says of each")
    parser.add_argument("--json", action="store_true", help="the results as one JSON object")
    parser.add_argument("--reasons", action="store_true", help="also say for each model why it was skipped")
    parser.add_argument("--token", default=os.environ.get("PULLBACK_TOKEN"), help="bearer token (PULLBACK_TOKEN)")
    parser.add_argument("--tls", action="store_true", help="an encrypted connection")
    parser.add_argument("--ca", metavar="FILE", help="certificates that vouch for the server; implies --tls")
    parser.add_argument("--cert", metavar="FILE", help="this client's own certificate; implies --tls")
    parser.add_argument("--key", metavar="FILE", help="and its key")
    parser.add_argument("--server-name", default="", metavar="NAME", help="the name on the server's certificate")
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="SECONDS", help="for each call (60)")
    parser.add_argument(
        "--patience", type=_seconds, default=5.0, metavar="SECONDS", help="to wait for the server's heartbeat (5)"
    )
    return parser


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def _list(chosen: Sequence[Check], as_json: bool) -> None:
    if as_json:
        json.dump([{"id": check.id, "says": check.says, "of": _of(check)} for check in chosen], sys.stdout, indent=1)
        print()
        return
    for check in chosen:
        print(f"{check.id:<27}{check.says}")


def _of(check: Check) -> str:
    return "model" if check.for_each_model else "server"


def _given(text: str) -> tuple[str, dict[str, np.ndarray]]:
    """MODEL=FILE.npz. Raises ValueError."""
    name, _, file = text.partition("=")
    if not (name and file):
        raise ValueError(f"--inputs {text}: expected MODEL=FILE.npz")
    with np.load(file, allow_pickle=False) as arrays:
        if not hasattr(arrays, "files"):
            raise ValueError(f"--inputs {text}: expected an .npz file, whose arrays have names")
        return name, {key: arrays[key] for key in arrays.files}


def _metadata(told: argparse.Namespace) -> tuple[tuple[str, str | bytes], ...]:
    if not told.token:
        return ()
    token = told.token.strip()
    if not all("!" <= letter <= "~" for letter in token):
        raise ValueError("the token has characters other than printable ASCII")
    return (("authorization", f"Bearer {token}"),)


def _tls(told: argparse.Namespace) -> dict[str, Any]:
    """gRPC's credentials. Raises ValueError for what does not go together, OSError for a file that is not there."""
    if not (told.tls or told.ca or told.cert or told.key):
        if told.token and not Address(told.target, None, 1.0, 1, (), "").is_private:
            raise ValueError("a token is not sent in plain text to another machine: use --tls")
        return {}
    import grpc

    ca, cert, key = (None if path is None else Path(path) for path in (told.ca, told.cert, told.key))
    tls = TLS(ca=ca, cert=cert, key=key)
    return {"credentials": grpc.ssl_channel_credentials(*tls.read()), "authority": told.server_name}


if __name__ == "__main__":
    sys.exit(main())
