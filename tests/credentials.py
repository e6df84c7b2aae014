"""Certificates, keys and tokens made on the spot, for servers that want to know who is calling."""

import datetime
import json
import time
from pathlib import Path
from typing import Any

import jwt
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

ISSUER, AUDIENCE = "https://issuer.example", "pullback"
_DAY = datetime.timedelta(days=1)


class Authority:
    """Somebody who certifies others."""

    def __init__(self, name: str = "authority") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = _begun(self._name, self._name, self._key, -1, 30)
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        certificate = certificate.add_extension(constraints, critical=True)
        # By these two of one name are told apart.
        identifier = x509.SubjectKeyIdentifier.from_public_key(self._key.public_key())
        signed = certificate.add_extension(identifier, critical=False).sign(self._key, hashes.SHA256())
        self.pem = signed.public_bytes(serialization.Encoding.PEM)

    def certify(
        self,
        *hosts: str,
        uris: tuple[str, ...] = (),
        common: str = "somebody",
        begins: float = -1,
        ends: float = 30,
        key: Any = None,
    ) -> tuple[bytes, bytes]:
        """A certificate and its key, PEM. begins, ends: days from now. key: None: one on P-256."""
        key = ec.generate_private_key(ec.SECP256R1()) if key is None else key
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = _begun(name, self._name, key, begins, ends).add_extension(issuer, critical=False)
        names = [*map(x509.DNSName, hosts), *map(x509.UniformResourceIdentifier, uris)]
        if names:
            certificate = certificate.add_extension(x509.SubjectAlternativeName(names), critical=False)
        signed = certificate.sign(self._key, hashes.SHA256())
        return signed.public_bytes(serialization.Encoding.PEM), _pem(key)


def _begun(
    name: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, begins: float, ends: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins * _DAY)
        .not_valid_after(now + ends * _DAY)
    )


def _pem(key: Any) -> bytes:
    form = serialization.PrivateFormat.PKCS8
    return bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))


def place(file: Path, data: bytes | str) -> None:
    """Puts a file in another's place at once, as tools that rotate secrets do."""
    beside = file.with_name(file.name + ".new")
    beside.write_bytes(data.encode() if isinstance(data, str) else data)
    beside.replace(file)


class Issuer:
    """Somebody who signs JWTs, by ES256 or by RS256."""

    def __init__(self, kid: str | None = "one", kind: str = "EC") -> None:
        self.kid = kid
        self.kind = kind
        self.key: Any = (
            ec.generate_private_key(ec.SECP256R1())
            if kind == "EC"
            else rsa.generate_private_key(public_exponent=65537, key_size=2048)
        )

    @property
    def jwk(self) -> dict[str, Any]:
        algorithm = jwt.algorithms.ECAlgorithm if self.kind == "EC" else jwt.algorithms.RSAAlgorithm
        found: dict[str, Any] = algorithm.to_jwk(self.key.public_key(), as_dict=True)
        return found | ({} if self.kid is None else {"kid": self.kid})

    @property
    def public_pem(self) -> bytes:
        form = serialization.PublicFormat.SubjectPublicKeyInfo
        return bytes(self.key.public_key().public_bytes(serialization.Encoding.PEM, form))

    def token(
        self, sub: Any = "alice", algorithm: str = "", headers: dict[str, Any] | None = None, **claims: Any
    ) -> str:
        """A claim given as None is left out."""
        told = {"iss": ISSUER, "aud": AUDIENCE, "sub": sub, "exp": time.time() + 300, **claims}
        return jwt.encode(
            {name: value for name, value in told.items() if value is not None},
            self.key,
            algorithm or ("ES256" if self.kind == "EC" else "RS256"),
            headers=({} if self.kid is None else {"kid": self.kid}) | (headers or {}),
        )


def key_set(*issuers: Issuer, more: tuple[dict[str, Any], ...] = ()) -> str:
    return json.dumps({"keys": [*(issuer.jwk for issuer in issuers), *more]})
