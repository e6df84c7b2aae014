"""JWTs that anybody may bring: whatever they say, they are refused with the documented fault."""

from __future__ import annotations

import base64
import functools
import json
import random
import time

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from tests.fuzz import mutating

from pullback_server.rpc.security.principals import Jwt
from pullback_server.rpc.security.tokens import Tokens

_ISSUER, _AUDIENCE = "https://issuer", "pullback"
_WORDS = (
    b'"alg":"none"', b'"alg":"HS256"', b'"alg":"ES256"', b'"alg":7', b'"alg":null', b'"kid":[]', b'"kid":"first"',
    b'"crit":["b64"]', b'"b64":false', b'"zip":"DEF"', b'"exp":1e400', b'"exp":"soon"', b'"exp":-1', b'"exp":NaN',
    b'"nbf":9e18', b'"iat":{}', b'"aud":[[]]', b'"aud":{}', b'"sub":7', b'"sub":null', b'"sub":"\\ud800"',
    b'"iss":["https://issuer"]',
)  # fmt: skip


@functools.cache
def _kept() -> tuple[ec.EllipticCurvePrivateKey, Tokens]:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    public |= {"kid": "first", "alg": "ES256"}
    settings = Jwt(issuer=_ISSUER, audience=_AUDIENCE, jwks="jwks.json", algorithms=["ES256"])
    return key, Tokens(settings, "jwks.json", json.dumps({"keys": [public]}).encode())


def token() -> bytes:
    """One that is as it should be."""
    claims = {"iss": _ISSUER, "aud": _AUDIENCE, "sub": "somebody", "exp": int(time.time()) + 3600}
    return jwt.encode(claims, _kept()[0], "ES256", {"kid": "first"}).encode()


def verify(data: bytes) -> None:
    """Only what was signed as it stands is good."""
    _kept()[1].verify(data.decode("latin-1"))


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Another header or other claims, signed anew as a rule: it is to be read, not merely refused."""
    parts = data.split(b".")
    if len(parts) != 3 or rng.random() < 0.3:
        return mutating.garbled(data, rng)
    at = rng.randrange(2)
    try:
        text = base64.urlsafe_b64decode(parts[at] + b"==")
    except ValueError:
        return mutating.garbled(data, rng)
    if rng.random() < 0.3:
        text = mutating.garbled(text, rng)
    else:
        cut = text.rfind(b"}")
        text = text[:cut] + b"," + rng.choice(_WORDS) + b"}"
    parts[at] = base64.urlsafe_b64encode(text).rstrip(b"=")
    if rng.random() < 0.7:
        algorithm = jwt.get_algorithm_by_name("ES256")
        signed = algorithm.sign(b".".join(parts[:2]), _kept()[0])
        parts[2] = base64.urlsafe_b64encode(signed).rstrip(b"=")
    return b".".join(parts)
