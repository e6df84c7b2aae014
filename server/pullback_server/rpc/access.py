"""Who may make administrative calls: whoever brings a key of which the server has the hash."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import tomllib
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pullback_server.faults import Fault
from pullback_wire import Reason

Right = Literal["load", "upload"]
#: Of a call, as gRPC gives it.
Metadata = Iterable[tuple[str, str | bytes]]
#: Metadata key of a key, as "Bearer KEY".
_AUTHORIZATION = "authorization"
_BEARER = "bearer "


class KeyFileError(Exception):
    """A file of keys that cannot be used; the message names it and what is wrong."""


class Key(BaseModel):
    """One key as its file has it.

    sha256: of the key, in hex; the key itself is random enough not to be guessed, so no slower hash is needed.
    models: globs of the models for which it is good.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    rights: Annotated[list[Right], Field(min_length=1)]
    models: list[str] = ["*"]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    key: list[Key]


class Access:
    """The keys of one server. None of them: administrative calls are off."""

    def __init__(self, keys: list[Key]) -> None:
        self._keys = keys

    @property
    def enabled(self) -> bool:
        """Whether administrative calls are offered at all."""
        return bool(self._keys)

    def check(self, metadata: Metadata, right: Right, model: str) -> str:
        """The name of the key that a call brings.

        Raises Fault: ADMIN_DISABLED, UNAUTHENTICATED, PERMISSION_DENIED.
        """
        if not self._keys:
            raise Fault(
                Reason.ADMIN_DISABLED,
                "this is an administrative call, and this server offers none (it was started without --admin-keys)",
            )
        found = self._find(metadata)
        if found is None:
            raise Fault(
                Reason.UNAUTHENTICATED,
                "an administrative call needs a key that this server knows, as metadata authorization: Bearer KEY",
            )
        if right not in found.rights or not any(fnmatchcase(model, pattern) for pattern in found.models):
            raise Fault(
                Reason.PERMISSION_DENIED, f"key {found.name!r} does not give the right to {right} model {model!r}"
            )
        return found.name

    def _find(self, metadata: Metadata) -> Key | None:
        for name, value in metadata:
            if name == _AUTHORIZATION and isinstance(value, str) and value.lower().startswith(_BEARER):
                digest = hashlib.sha256(value[len(_BEARER) :].strip().encode()).hexdigest()
                for key in self._keys:
                    if hmac.compare_digest(key.sha256, digest):
                        return key
        return None


def read_keys(path: str | None) -> Access:
    """The keys of a TOML file: tables [[key]] with name, sha256, rights, models. No file: none.

    Raises KeyFileError.
    """
    if path is None:
        return Access([])
    try:
        text = Path(path).read_text()
        found = _File.model_validate(tomllib.loads(text))
    except OSError as error:
        raise KeyFileError(f"admin keys {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"admin keys {path}: {error}") from error
    except ValidationError as error:
        raise KeyFileError(f"admin keys {path}: {_told(error)}") from None
    names = [key.name for key in found.key]
    if len(set(names)) < len(names):
        raise KeyFileError(f"admin keys {path}: two keys have one name")
    if len({key.sha256 for key in found.key}) < len(found.key):
        raise KeyFileError(f"admin keys {path}: two keys have one sha256, so that it is open which of them a call has")
    return Access(found.key)


def new_key(name: str, rights: list[str], models: list[str]) -> tuple[str, str]:
    """A fresh key, and its entry for the file of keys.

    Raises ValueError for what such an entry cannot say.
    """
    # One that begins so would be taken for an option where it follows --key.
    while (key := secrets.token_urlsafe(32)).startswith("-"):
        pass
    digest = hashlib.sha256(key.encode()).hexdigest()
    try:
        entry = Key.model_validate({"name": name, "sha256": digest, "rights": rights, "models": models})
    except ValidationError as error:
        raise ValueError(_told(error)) from None
    # JSON's strings and lists of strings are TOML's as well.
    fields = [f"{field} = {json.dumps(value)}\n" for field, value in entry.model_dump().items()]
    return key, "[[key]]\n" + "".join(fields)


def _told(error: ValidationError) -> str:
    problems = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in problems)
