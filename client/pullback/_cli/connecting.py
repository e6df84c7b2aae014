"""The client of a command, and what of encryption is wrong, said by option before anything is sent."""

from __future__ import annotations

import argparse
import ssl
from pathlib import Path

import pullback
from pullback._cli.usage import UsageError

DEFAULT_TARGET = "localhost:8470"
#: Seconds that calls may take where --timeout is not given.
QUICK, LOADING, UPLOADING = 30.0, 600.0, 3600.0


def connected(arguments: argparse.Namespace, retry: pullback.RetryPolicy | None = None) -> pullback.Client:
    """A client of --target. Raises ValueError and OSError for settings that cannot be."""
    target: str = arguments.target
    # Both have been called target, one of them here; IPv6 addresses are in brackets, and have a port behind them.
    if target.startswith("@") or "=@" in target or (target.startswith("[") and "]:" not in target):
        raise UsageError(f"argument --target: {target!r} is no address of a server; a loss's target is --loss-target")
    return pullback.connect(
        target,
        tls=tls_of(arguments),
        timeout=arguments.timeout or QUICK,
        retry=retry,
        name="pullback-cli",
        token=arguments.token,
        allow_plaintext_token=arguments.allow_plaintext_token,
    )


def wants_tls(arguments: argparse.Namespace) -> bool:
    """Whether any of the options asks for encryption."""
    given = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_server_name)
    return bool(arguments.tls or any(given))


def tls_of(arguments: argparse.Namespace) -> pullback.TLS | None:
    """What the options say of encryption; None: plain text. Raises OSError, ValueError naming the option."""
    if not wants_tls(arguments):
        return None
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ValueError("--tls-cert and --tls-key belong together: give both or neither")
    tls_context(arguments)
    return pullback.TLS(
        ca=arguments.tls_ca, cert=arguments.tls_cert, key=arguments.tls_key, server_name=arguments.tls_server_name
    )


def tls_context(arguments: argparse.Namespace) -> ssl.SSLContext:
    """The same for HTTPS. gRPC itself says little of a file that holds something else; Python's ssl does."""
    for option, path in (
        ("--tls-ca", arguments.tls_ca),
        ("--tls-cert", arguments.tls_cert),
        ("--tls-key", arguments.tls_key),
    ):
        if path is not None:
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise OSError(f"{option} {path}: {error.strerror}") from None
    try:
        context = ssl.create_default_context(cafile=arguments.tls_ca)
    except ssl.SSLError:
        raise ValueError(f"--tls-ca {arguments.tls_ca}: the file holds no PEM certificates") from None
    if arguments.tls_cert is not None and arguments.tls_key is not None:
        try:
            # A key with a passphrase would have it ask at the terminal; gRPC could not use it either.
            context.load_cert_chain(arguments.tls_cert, arguments.tls_key, password=b"")
        except ssl.SSLError as error:
            raise ValueError(
                f"--tls-cert {arguments.tls_cert} and --tls-key {arguments.tls_key}: {error.reason or error}; expected "
                "PEM files of a certificate and its private key without a passphrase"
            ) from None
    return context
