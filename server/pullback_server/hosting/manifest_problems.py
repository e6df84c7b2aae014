"""What pydantic and the dataclasses find wrong with a manifest, in the house's words: KEY is VALUE, expected WHAT."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from pullback_server.hosting.gate import Gate
from pullback_server.hosting.options import Batching, Compile, GradientHealth, Options

#: Unknown keys for which it is looked what may have been meant.
_HINTS = 10

#: Tables that are dataclasses, which check themselves.
_CHECKED = {
    ("options",): Options,
    ("options", "batching"): Batching,
    ("options", "compile"): Compile,
    ("options", "gradient_health"): GradientHealth,
    ("gate",): Gate,
}

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text in quotes",
    "string_too_short": "a text that is not empty",
    "tuple_type": "a list",
    "too_short": "a list that is not empty",
    "dict_type": "a table",
    "model_type": "a table",
    "dataclass_type": "a table",
}

Path = tuple[str | int, ...]


def problems_of(error: ValidationError, data: dict[str, Any], model: type[BaseModel]) -> list[str]:
    """One sentence for each thing that is wrong with `data`, from which `model` could not be made."""
    known = _known(model)
    hints = 0
    found: dict[Path, list[str]] = {}
    for one in error.errors(include_url=False):
        unknown = one["type"] in ("extra_forbidden", "unexpected_keyword_argument")
        where = one["loc"] if unknown else _within(one["loc"], data)
        if one["type"] == "value_error" and where in _CHECKED:
            # It tells of its first problem only, and not always of which key: see below.
            continue
        if one["type"] == "too_short" and _at(where, data):
            # Members that are wrong have not been counted.
            continue
        hints += unknown
        text = _expected(one) if not unknown else _unknown(where, known) if hints <= _HINTS else "is not a key"
        # Of a union, every member has complained.
        if text not in found.setdefault(where, []):
            found[where].append(text)
    told = [line for where, texts in found.items() for line in _lines(where, texts, data)]
    for table, made in _CHECKED.items():
        for key, message in _impossible(made, _at(table, data)):
            if (*table, key) not in found:
                told.append(_joined(table, key, message))
    # A dataclass whose keys are each possible, but not together.
    return told or [f"{_dotted(_within(one['loc'], data))}: {one['msg']}" for one in error.errors()]


def _known(model: type[BaseModel], path: Path = ()) -> dict[Path, list[str]]:
    """The keys of each table; "*" stands for any name."""
    tables: dict[Path, list[str]] = {path: [one.alias or name for name, one in model.model_fields.items()]}
    for name, one in model.model_fields.items():
        for kind in (one.annotation, *get_args(one.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                inner: Path = (*path, name) if kind is one.annotation else (*path, name, "*")
                tables |= _known(kind, inner)
    tables |= {path: [one.name for one in dataclasses.fields(made)] for path, made in _CHECKED.items()}
    return tables


def _unknown(where: Path, known: dict[Path, list[str]]) -> str:
    table, key = where[:-1], str(where[-1])
    keys = known.get(table) or known.get((*table[:-1], "*"), [])
    close = difflib.get_close_matches(key, keys, 1)
    elsewhere = [_dotted((*path, key)) for path, names in known.items() if key in names and "*" not in path]
    if elsewhere:
        # In TOML, what follows a [table] belongs to it.
        hint = f"did you mean {elsewhere[0]}?" + ("" if "." in elsewhere[0] else " It goes above the first [table]")
    elif close:
        hint = f"did you mean {_dotted((*table, close[0]))}?"
    else:
        hint = f"expected one of {', '.join(sorted(keys))}"
    return f"is not a key; {hint}"


def _expected(one: ErrorDetails) -> str:
    context = one.get("ctx", {})
    if one["type"] in ("value_error", "problems"):
        return str(context.get("error", context.get("text")))
    if one["type"] == "literal_error":
        return f"expected {context['expected']}"
    if one["type"] == "greater_than_equal":
        return f"expected {context['ge']} or more"
    return f"expected {_EXPECTED.get(one['type'], one['msg'])}"


def _lines(where: Path, texts: list[str], data: dict[str, Any]) -> Iterator[str]:
    wanted = [text.removeprefix("expected ") for text in texts if text.startswith("expected ")]
    if wanted:
        yield f"{_dotted(where)} is {_shown(_at(where, data))}, expected {' or '.join(wanted)}"
    for text in texts:
        if text.startswith("expected "):
            continue
        for line in text.split("\n"):
            if line.startswith(("is ", "has ")):
                yield f"{_dotted(where)} {line}"
            elif isinstance(_at(where, data), dict):
                # Said of a table as a whole: it begins with the key.
                yield _dotted((*where, line))
            else:
                yield f"{_dotted(where)}: {line}"


def _impossible(made: type, table: object) -> Iterator[tuple[str, str]]:
    """Keys of a table that `made` refuses, and what it says of each."""
    names = {one.name for one in dataclasses.fields(made)}
    for key, value in table.items() if isinstance(table, dict) else ():
        try:
            if key in names:
                made(**{key: value})
        except (ValueError, TypeError, AttributeError) as error:
            yield key, str(error)


def _joined(table: Path, key: str, message: str) -> str:
    # It names the key, with or without its table.
    own = f"{table[-1]}.{key}"
    for start in (own, key):
        if message.startswith(start):
            return _dotted((*table, key)) + message.removeprefix(start)
    return f"{_dotted((*table, key))}: {message}"


def _within(loc: Path, data: object) -> Path:
    """The part of a location that names keys: pydantic adds the members of unions."""
    for depth, part in enumerate(loc):
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return loc[:depth]
    return loc


def _at(where: Path, data: object) -> object:
    for part in where:
        try:
            data = data[part]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _dotted(where: Path) -> str:
    return ".".join(str(part) for part in where)


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    shown = "a table" if isinstance(value, dict) else repr(value)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."
