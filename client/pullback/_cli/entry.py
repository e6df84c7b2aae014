"""From a command line to its exit status."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pullback
from pullback._cli.parser import defaults, parser
from pullback._cli.tables import visible
from pullback._cli.usage import UsageError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line. Returns the exit status: 0 done, 1 failed (a sentence on stderr), 130 after Ctrl-C.

    Raises SystemExit: with 2 on bad usage, with 0 after --help and --version.
    """
    _open_streams()
    arguments = parser().parse_args(argv, argparse.Namespace(**defaults()))
    run: Callable[[argparse.Namespace], None] = arguments.run
    # What gRPC's core says of a failed handshake, it says again in the error.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        run(arguments)
        # Here rather than at exit, where a closed pipe could no longer be answered for.
        sys.stdout.flush()
    except UsageError as error:
        arguments.parser.error(str(error))
    except BrokenPipeError:
        # `pullback models | head`: whoever reads has read enough. Nothing more may be written at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # ImportError: of the packages that only some commands need. TypeError: of arrays that make no request.
    except (pullback.PullbackError, OSError, ValueError, TypeError, ImportError, MemoryError) as error:
        print(f"pullback: {visible(' '.join(_said(error, arguments).split()))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _open_streams() -> None:
    """So that everything can be printed anywhere.

    Of a stream that is closed (`>&-`) Python makes None, and what is opened next would get its descriptor. What the
    locale cannot express is written out.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open(mode))  # noqa: SIM115 - open until the end
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _said(error: Exception, arguments: argparse.Namespace) -> str:
    """Its sentence; of a file's error without the number, of a certificate's without gRPC's words around it."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    told = str(error) or type(error).__name__
    _, found, why = told.partition("CERTIFICATE_VERIFY_FAILED: ")
    if not found:
        return told
    who = f"--tls-ca {arguments.tls_ca}" if arguments.tls_ca else "the public authorities (see --tls-ca)"
    return f"{arguments.target}: {who} cannot vouch for the server's certificate: {why.removesuffix(': OK')}"
