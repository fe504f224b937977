"""The faults that validation finds, in words: each as what is wrong and its remedy."""

from __future__ import annotations

import types
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from paceline.config.document import Document
from paceline.providers.catalogue import Path

_SECRET = frozenset({"store", "store_file", "token_sha256", "token_env", "token_file", "url", "url_env", "secret_env"})
_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The remedy for a word that is not known: the nearest one, or all of them."""
    choices = sorted(known)
    near = get_close_matches(word, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]!r}?"
    if not choices:
        return "there are none; define it first"
    shown = ", ".join(choices[:20])
    return f"known: {shown}" + (", …" if len(choices) > 20 else "")


def faults(error: ValidationError, model: type[BaseModel], document: Document) -> list[tuple[Path, str]]:
    """The faults of a validation, each at its place in the document; only the most telling of each place."""
    found: dict[Path, str] = {}
    for details in error.errors(include_url=False):
        place = document.locate(details["loc"])
        if details["type"] == "missing":
            place = (*place, details["loc"][-1])
        # Where a word or a mapping may stand, the words tell more than that it is no mapping.
        if place not in found or details["type"] == "literal_error":
            found[place] = _message(details, place, model)
    # Of a value that may have several forms, all but one fail: what lies deeper tells which was meant.
    return [
        (place, message)
        for place, message in found.items()
        if not any(len(other) > len(place) and other[: len(place)] == place for other in found)
    ]


def _message(details: ErrorDetails, place: Path, model: type[BaseModel]) -> str:
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    if kind == "extra_forbidden":
        return _unknown_field(details, model)
    if kind == "missing":
        return "is missing; add it"
    if kind in ("value_error", "assertion_error"):
        return str(context.get("error", details["msg"]))
    shown = "" if _SECRET.intersection(place) else f", is {_shown(value)}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}{shown}; correct it"
    if kind in ("literal_error", "enum"):
        expected = str(context.get("expected", ""))
        choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
        near = get_close_matches(str(value), choices, n=1)
        return f"must be {expected}{shown}; {f'did you mean {near[0]!r}?' if near else 'choose one'}"
    if kind in ("greater_than_equal", "greater_than"):
        least = context.get("ge", context.get("gt"))
        if least == 0 and isinstance(value, int | float) and value < 0:
            return f"must not be negative{shown}; give zero or more"
        return f"must be at least {least:,}{shown}; raise it"
    if kind in ("less_than_equal", "less_than"):
        return f"must be at most {context.get('le', context.get('lt')):,}{shown}; lower it"
    if kind == "string_pattern_mismatch":
        return f"has a form that is not allowed{shown}; {_pattern(str(context.get('pattern')))}"
    if kind == "string_too_long":
        return f"is too long; {context.get('max_length')} characters are allowed"
    if kind == "string_too_short":
        return "must not be empty; give a value"
    return f"{details['msg'][:1].lower()}{details['msg'][1:]}; correct it"


def _unknown_field(details: ErrorDetails, model: type[BaseModel]) -> str:
    name = str(details["loc"][-1])
    if name == "token":
        return "tokens do not belong into this file; use token_sha256, token_env or token_file"
    if name == "secret":
        return "secrets do not belong into this file; use secret_env"
    owner = _model_at(model, details["loc"][:-1])
    if owner is None:
        return "is not a field; remove it"
    fields = [field.alias or key for key, field in owner.model_fields.items()]
    return f"is not a field; {did_you_mean(name, fields)}"


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model of the value at a path of a validation error."""
    here: Any = model
    for step in path:
        options = list(_options(here))
        for option in options:
            if isinstance(option, type) and issubclass(option, BaseModel):
                field = next((f for key, f in option.model_fields.items() if step in (f.alias, key)), None)
                if field is not None:
                    here = field.annotation
                    break
            elif get_origin(option) is dict and isinstance(step, str):
                here = get_args(option)[1]
                break
            elif get_origin(option) in (list, tuple) and isinstance(step, int):
                here = get_args(option)[0]
                break
        else:
            # A step that names one form of several.
            named = [option for option in options if getattr(option, "__name__", None) == step]
            if not named:
                return None
            here = named[0]
    return next((o for o in _options(here) if isinstance(o, type) and issubclass(o, BaseModel)), None)


def _options(annotation: Any) -> Iterable[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _options(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for each in get_args(annotation):
            yield from _options(each)
    else:
        yield annotation


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _pattern(pattern: str) -> str:
    if "{64}" in pattern:
        return "write the 64 lower-case hexadecimal digits of a SHA-256"
    if "." not in pattern:
        return "write an environment variable's name: letters, digits and _"
    if "A-Z" not in pattern:
        return "use lower-case letters, digits, and . _ - between them"
    return "use letters, digits, and . _ - between them"
