"""The principals file: who there is, by what each is known, and what each may do."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import translate
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

Right = Literal["call", "session", "upload", "admin", "metrics"]
RIGHTS: tuple[Right, ...] = get_args(Right)

#: Algorithms that a JWT may be signed with. None with a shared secret: whoever checks such a token could make one, and
#: a public key could be passed off as that secret.
Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]

#: What callers are called who bring nothing that tells who they are.
ANONYMOUS = "anonymous"
#: Model names whose answer is remembered: how long they may be, and how many.
_LONGEST, _MOST = 256, 4096

_Text = Annotated[str, Field(min_length=1)]
_Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_Count = Annotated[int, Field(ge=0)]


class PrincipalsError(Exception):
    """A principals file, or what it refers to, that cannot be used; the message names it and all that is wrong."""


class Quota(BaseModel):
    """What one principal may use, over all its connections. None: no limit.

    calls_per_second: calls and ops of sessions; after a pause one second's worth may come at once, and always one.
    bytes_per_second: of requests and answers. Whatever comes while nothing is owed passes whole, and is then owed.
    sessions: open at once. retained_bytes: that the tensors and graphs of its sessions hold on workers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    calls_per_second: _Rate | None = None
    bytes_per_second: _Rate | None = None
    sessions: _Count | None = None
    retained_bytes: _Count | None = None


class _Anonymous(Quota):
    rights: list[Right]
    models: list[_Text] = ["*"]


class Entry(_Anonymous):
    """One principal as the file has it.

    sha256: hashes of its bearer tokens, in hex; these are random enough not to be guessed, so no slower hash is needed.
    subjects: globs of the subjects of JWTs. certificates: globs of names in client certificates.
    """

    # Found in logs, and what shares and limits go by: no room for tricks with spaces or look-alikes.
    name: Annotated[str, Field(pattern="^[A-Za-z0-9][A-Za-z0-9._@+-]{0,127}$")]
    sha256: list[Annotated[str, Field(pattern="^[0-9a-f]{64}$")]] = []
    subjects: list[_Text] = []
    certificates: list[_Text] = []
    rights: Annotated[list[Right], Field(min_length=1)]


class Jwt(BaseModel):
    """What a JWT must be like.

    jwks: path of the JSON Web Key Set, from the principals file's folder. claim: that names the subject.
    leeway_seconds: by which clocks may differ.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    issuer: _Text
    audience: Annotated[list[_Text], Field(min_length=1)]
    jwks: _Text
    algorithms: Annotated[list[Algorithm], Field(min_length=1)] = ["RS256", "PS256", "ES256", "EdDSA"]
    claim: _Text = "sub"
    leeway_seconds: Annotated[float, Field(ge=0, le=300)] = 10.0

    @field_validator("audience", mode="before")
    @classmethod
    def _listed(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    principal: list[Entry] = []
    jwt: Jwt | None = None
    anonymous: _Anonymous | None = None


class Globs:
    """Patterns of which one must match the whole of a text: * any characters, also "/" and "."; ? one; [ab] of these.

    Upper and lower case differ.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._all = "*" in self.patterns
        self._expressions = [re.compile(translate(pattern)) for pattern in self.patterns]

    def match(self, text: str) -> bool:
        return self._all or any(expression.match(text) for expression in self._expressions)


class Principal:
    """Somebody who may do something, as the file has it at the time."""

    def __init__(self, name: str, rights: Iterable[Right], models: Sequence[str], quota: Quota) -> None:
        self.name = name
        self.rights = frozenset(rights)
        self.quota = quota
        self._models = Globs(models)
        self._seen: dict[str, bool] = {}

    @property
    def sees_all(self) -> bool:
        """Whether every model is this one's."""
        return "*" in self._models.patterns

    def sees(self, model: str) -> bool:
        """Whether a model of this name, should there be one, is this one's to use."""
        known = self._seen.get(model)
        if known is None:
            known = self._models.match(model)
            # Names are what callers make them.
            if len(model) <= _LONGEST:
                if len(self._seen) >= _MOST:
                    self._seen.clear()
                self._seen[model] = known
        return known


class Book:
    """A principals file that was read: finds whose a credential is. Never changed, so any thread may look.

    Where several principals' globs match, the first in the file is meant.
    """

    def __init__(self, file: _File) -> None:
        self.jwt = file.jwt
        self.by_digest: dict[str, Principal] = {}
        self._by_subject: list[tuple[Globs, Principal]] = []
        self._by_certificate: list[tuple[_Names, Principal]] = []
        self.names = {ANONYMOUS}
        for entry in file.principal:
            principal = _principal(entry.name, entry)
            self.names.add(entry.name)
            self.by_digest.update(dict.fromkeys(entry.sha256, principal))
            self._by_subject.append((Globs(entry.subjects), principal))
            self._by_certificate.append((_Names(entry.certificates), principal))
        self.anonymous = None if file.anonymous is None else _principal(ANONYMOUS, file.anonymous)

    def of_subject(self, subject: str) -> Principal | None:
        """Whose JWTs have this subject."""
        return next((principal for globs, principal in self._by_subject if globs.match(subject)), None)

    def of_certificate(self, names: Sequence[str]) -> Principal | None:
        """Whose certificates carry one of these names."""
        return next((principal for globs, principal in self._by_certificate if any(map(globs.match, names))), None)


class _Names:
    """Globs of the names in certificates: those with "://" match URIs alone, the others host names and common names.

    Whoever may have any host name certified must not become a URI by that.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        self._any = "*" in patterns
        self._uris = Globs(pattern for pattern in patterns if "://" in pattern)
        self._hosts = Globs(pattern for pattern in patterns if "://" not in pattern)

    def match(self, name: str) -> bool:
        return self._any or (self._uris if "://" in name else self._hosts).match(name)


def _principal(name: str, entry: _Anonymous) -> Principal:
    quota = Quota(**{field: getattr(entry, field) for field in Quota.model_fields})
    return Principal(name, entry.rights, entry.models, quota)


def read_book(path: str, data: bytes) -> Book:
    """The principals of a file's contents. Raises PrincipalsError with everything that is wrong."""
    try:
        table = tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PrincipalsError(f"principals {path}: {error}") from None
    try:
        file = _File.model_validate(table)
    except ValidationError as error:
        raise PrincipalsError(f"principals {path}: {told(error, table)}") from None
    if problems := [*_problems(file)]:
        raise PrincipalsError(f"principals {path}: {'; '.join(problems)}")
    return Book(file)


def _problems(file: _File) -> Iterator[str]:
    """What no single field shows."""
    for name, number in Counter(entry.name for entry in file.principal).items():
        if number > 1:
            yield f"{number} principals are called {name!r}"
        if name == ANONYMOUS:
            yield f"a principal is called {ANONYMOUS!r}, which is what callers without credentials are called"
    for field in ("sha256", "subjects", "certificates"):
        owners: dict[str, list[str]] = {}
        for entry in file.principal:
            for value in dict.fromkeys(getattr(entry, field)):
                owners.setdefault(value, []).append(entry.name)
        for value, names in owners.items():
            if len(names) > 1:
                shown = value if field != "sha256" else f"{value[:8]}..."
                yield f"{' and '.join(map(repr, names))} have {shown!r} in {field}, so that it is open who is meant"
    if not file.principal and file.anonymous is None:
        # An empty file is one that somebody is writing, or that went wrong, sooner than a wish to lock everybody out.
        yield "there is nobody in it; where nobody is meant, say so by [anonymous] with rights = []"
    for entry in file.principal:
        if not (entry.sha256 or entry.subjects or entry.certificates):
            yield f"principal {entry.name!r} has neither sha256 nor subjects nor certificates, so nobody can be it"
        if entry.subjects and file.jwt is None:
            yield f"principal {entry.name!r} has subjects, and there is no [jwt]"


def told(error: ValidationError, table: dict[str, Any] | None = None) -> str:
    """What a validation found, without the values, which may be secrets that were pasted where they do not belong."""
    sentences = []
    for one in error.errors(include_input=False, include_url=False, include_context=False):
        place = list(one["loc"])
        where = ""
        if table is not None and len(place) > 1 and place[0] == "principal" and isinstance(place[1], int):
            found = table["principal"][place[1]]
            name = found.get("name") if isinstance(found, dict) else None
            where = f"principal {place[1] + 1}" + (f" ({name!r})" if isinstance(name, str) else "") + ": "
            place = place[2:]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).lstrip(".")
        sentences.append(f"{where}{field}: {one['msg']}")
    return "; ".join(sentences)


def new_key(
    name: str, rights: Sequence[str], models: Sequence[str] = ("*",), quota: dict[str, float] | None = None
) -> tuple[str, str]:
    """A fresh token, and its entry for a principals file, which holds only the token's hash.

    quota: fields of Quota. Raises ValueError for what such an entry cannot say.
    """
    # One that begins so would be taken for an option where it follows --token.
    while (token := secrets.token_urlsafe(32)).startswith("-"):
        pass
    digest = hashlib.sha256(token.encode()).hexdigest()
    fields = {"name": name, "sha256": [digest], "rights": list(rights), "models": list(models), **(quota or {})}
    try:
        Entry.model_validate(fields)
    except ValidationError as error:
        raise ValueError(told(error)) from None
    # JSON's strings, numbers and lists of them are TOML's as well.
    return token, "[[principal]]\n" + "".join(f"{field} = {json.dumps(value)}\n" for field, value in fields.items())
