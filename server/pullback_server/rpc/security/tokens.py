"""JSON Web Tokens: checked against the issuer's public keys, which lie in a file."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
import warnings
from typing import Any, NamedTuple

import jwt

from pullback_server.faults import Fault
from pullback_server.rpc.security.principals import Jwt, PrincipalsError
from pullback_wire import Reason

logger = logging.getLogger(__name__)

#: JSON's kty of each algorithm's keys, and the curves where these matter.
_KINDS = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
_CURVES = {"ES256": ("P-256",), "ES384": ("P-384",), "ES512": ("P-521",), "EdDSA": ("Ed25519", "Ed448")}
_SMALLEST_RSA = 2048
#: Tokens remembered that were found good.
_MOST = 4096
#: How what is wrong with a token is told.
_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet"),
    (jwt.InvalidAudienceError, "it is for another audience"),
    (jwt.InvalidIssuerError, "it has another issuer"),
    (jwt.MissingRequiredClaimError, "it lacks one of the claims exp, iss, aud and the subject's"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
)


class Verified(NamedTuple):
    """What a good token says. expires: on time.time's clock, leeway included."""

    subject: str
    expires: float


class _Key(NamedTuple):
    kid: str | None
    by_algorithm: dict[str, jwt.PyJWK]


class Tokens:
    """Checks tokens by one [jwt] table and one key set. Any thread may ask.

    data: the key set's bytes. Raises PrincipalsError for one that is none, or in which no key is of use.
    """

    def __init__(self, settings: Jwt, path: str, data: bytes) -> None:
        self._settings = settings
        self._keys = _keys(settings, path, data)
        self._good: dict[bytes, Verified] = {}

    def verify(self, token: str) -> Verified:
        """Raises Fault (UNAUTHENTICATED), which says what is wrong and nothing of the token."""
        digest = hashlib.sha256(token.encode()).digest()
        known = self._good.get(digest)
        if known is None:
            known = self._checked(token)
            if len(self._good) >= _MOST:
                self._good.clear()
            self._good[digest] = known
        if time.time() >= known.expires:
            self._good.pop(digest, None)
            raise _bad("it has expired")
        return known

    def _checked(self, token: str) -> Verified:
        try:
            header = jwt.get_unverified_header(token)
            claims = self._claims(token, header)
            subject = claims[self._settings.claim]
            expires = float(claims["exp"])
        except Fault:
            raise
        # Whatever a caller can make a parser raise means the same.
        except Exception as error:
            raise _bad(next((words for kind, words in _WORDS if isinstance(error, kind)), "it is malformed")) from None
        if not isinstance(subject, str) or not subject:
            raise _bad(f"its claim {self._settings.claim!r} is no text")
        if not math.isfinite(expires):
            raise _bad("it is malformed")
        return Verified(subject, expires + self._settings.leeway_seconds)

    def _claims(self, token: str, header: dict[str, Any]) -> dict[str, Any]:
        """The claims of a token whose signature and claims are good. Raises Fault, PyJWTError."""
        algorithm = header.get("alg")
        if algorithm not in self._settings.algorithms:
            raise _bad("it is signed with an algorithm that is not allowed here")
        if "crit" in header:
            raise _bad("its header asks for an extension that is not known here")
        kid = header.get("kid")
        keys = [
            key.by_algorithm[algorithm]
            for key in self._keys
            if algorithm in key.by_algorithm and (kid is None or key.kid == kid)
        ]
        if not keys:
            raise _bad("it is signed with a key that is not in the key set")
        if kid is None and len(keys) > 1:
            raise _bad("its header names no key (kid), and several could be meant")
        settings = self._settings
        for number, key in enumerate(keys, 1):
            try:
                return jwt.decode(
                    token,
                    key,
                    algorithms=[algorithm],
                    audience=settings.audience,
                    issuer=settings.issuer,
                    leeway=settings.leeway_seconds,
                    options={"require": ["exp", "iss", "aud", settings.claim]},
                )
            except jwt.InvalidSignatureError:
                # Two keys of one name: a set in the middle of a rotation.
                if number == len(keys):
                    raise
        raise AssertionError("there was at least one key")


def _bad(why: str) -> Fault:
    return Fault(Reason.UNAUTHENTICATED, f"the token is not good: {why}")


def _keys(settings: Jwt, path: str, data: bytes) -> list[_Key]:
    try:
        found = json.loads(data)
        listed = found["keys"]
        if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
            raise TypeError
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PrincipalsError(f"key set {path}: expected JSON with a list of keys under 'keys'") from None
    keys = []
    for number, one in enumerate(listed, 1):
        if "d" in one or one.get("kty") == "oct":
            # Whoever can read it could make tokens.
            raise PrincipalsError(f"key set {path}: key {number} is secret; only public keys belong here")
        usable = one.get("use", "sig") == "sig" and "verify" in one.get("key_ops", ["verify"])
        made = _by_algorithm(one, settings.algorithms) if usable else {}
        if made:
            kid = one.get("kid")
            keys.append(_Key(kid if isinstance(kid, str) else None, made))
        else:
            logger.info("key set %s: key %d is not used, being for other algorithms or purposes", path, number)
    if not keys:
        raise PrincipalsError(f"key set {path}: no key is for any of {', '.join(settings.algorithms)}")
    return keys


def _by_algorithm(one: dict[str, Any], algorithms: list[Any]) -> dict[str, jwt.PyJWK]:
    made = {}
    for algorithm in algorithms:
        if one.get("kty") != _KINDS[algorithm[:2]] or one.get("alg", algorithm) != algorithm:
            continue
        if one.get("crv") not in _CURVES.get(algorithm, (one.get("crv"),)):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                key = jwt.PyJWK(one, algorithm)
        # Base64 that is none, points off the curve: it is somebody else's file.
        except Exception:
            continue
        if getattr(key.key, "key_size", _SMALLEST_RSA) >= _SMALLEST_RSA or one["kty"] != "RSA":
            made[algorithm] = key
    return made
