"""Reading the configuration: file, environment, catalogue files. Every fault becomes one line."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path as FilePath
from typing import NamedTuple, TypeVar

from pydantic import ValidationError

from paceline.config import checks
from paceline.config.document import MAX_BYTES, ConfigError, Document, read
from paceline.config.model import ENVIRONMENT, Config, IdentitySpec
from paceline.config.wording import faults
from paceline.providers import catalogue as providers
from paceline.providers.catalogue import Path
from paceline.providers.schema import CatalogueSpec, Strict, merge

M = TypeVar("M", bound=Strict)


class Report(NamedTuple):
    """What a check says: faults that prevent a start, and notes that do not. One line each."""

    errors: tuple[str, ...]
    notes: tuple[str, ...]


def load_config(
    path: str | FilePath | None = None, environ: Mapping[str, str] | None = None, *, secrets: bool = True
) -> Config:
    """Read, complete and check the configuration. Raises :class:`ConfigError` with every fault found.

    Without ``path`` all is default but what the environment sets. Lines are ``FILE:LINE: path.to.field: what;
    fix``. Without ``secrets`` the file that holds the store's URL is left unread, and ``store`` at its default.
    """
    document = Document("(defaults)", {}) if path is None else _read(str(path))
    _overlay(document, os.environ if environ is None else environ)
    _take_store(document, secrets)
    config = _validated(Config, document)
    folder = FilePath() if path is None else FilePath(path).parent
    files = _catalogue_files(config, document, folder)
    found = list(_catalogue_problems(config, document, files)) or _lines(document, checks.problems(config))
    if found:
        raise ConfigError(found)
    config._notes = tuple(_lines(document, checks.notes(config)))
    return config


def check(path: str | FilePath | None, environ: Mapping[str, str] | None = None) -> Report:
    """Whether a configuration can be used, and what deserves a word. Files that hold secrets are not read."""
    try:
        config = load_config(path, environ, secrets=False)
    except ConfigError as error:
        return Report(tuple(error.lines), ())
    return Report((), config.notes)


def token_hashes(config: Config, environ: Mapping[str, str] | None = None) -> dict[bytes, IdentitySpec]:
    """The identities by the SHA-256 of their tokens. Reads the variables and files that hold tokens.

    Raises :class:`ConfigError`; its lines never hold a token.
    """
    environ = os.environ if environ is None else environ
    found: dict[bytes, IdentitySpec] = {}
    errors: list[str] = []
    for identity in config.identities:
        where = f"identities: {identity.name}"
        try:
            digest = _digest(identity, environ)
        except LookupError as error:
            errors.append(f"{where}: {error.args[0]}")
            continue
        if digest in found:
            errors.append(f"{where}: has the same token as {found[digest].name!r}; give each its own")
        found[digest] = identity
    if errors:
        raise ConfigError(errors)
    return found


def _digest(identity: IdentitySpec, environ: Mapping[str, str]) -> bytes:
    if identity.token_sha256 is not None:
        return bytes.fromhex(identity.token_sha256)
    if identity.token_env is not None:
        token = environ.get(identity.token_env, "").strip()
        source = f"environment variable {identity.token_env}"
    else:
        source = f"file {identity.token_file}"
        token = _secret(identity.token_file or "")
    if not token:
        raise LookupError(f"{source} holds no token; set it")
    return hashlib.sha256(token.encode()).digest()


def _secret(path: str) -> str:
    """What a file holds that is not part of the configuration. Raises :class:`LookupError`."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(64 * 1024).strip()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise LookupError(f"file {path} cannot be read ({reason}); mend it") from None


def _read(path: str) -> Document:
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}:1: file: cannot be read ({error.strerror}); check the path"]) from None
    return read(path, raw)


def _overlay(document: Document, environ: Mapping[str, str]) -> None:
    if not isinstance(document.data, dict):
        raise ConfigError([document.line((), "must be a mapping of fields; correct it")])
    for variable, field in ENVIRONMENT.items():
        value = environ.get(variable)
        if value:
            document.data[field] = value
            document.sources[(field,)] = variable


def _take_store(document: Document, secrets: bool) -> None:
    """Put the store's URL from its file in the place of ``store``."""
    data = document.data
    if not isinstance(data, dict):
        return
    where, variables = data.get("store_file"), document.sources
    if ("store",) in variables and ("store_file",) not in variables:
        data.pop("store_file", None)
        return
    if not isinstance(where, str) or not where:
        return
    if ("store_file",) in variables and ("store",) not in variables:
        data.pop("store", None)
    if "store" in data:
        raise ConfigError([document.line(("store_file",), "stands beside store; remove one of the two")])
    if not secrets:
        return
    try:
        url = _secret(where)
        if not url:
            raise LookupError(f"file {where} holds no store URL; write one into it")
    except LookupError as error:
        raise ConfigError([document.line(("store_file",), error.args[0])]) from None
    data["store"] = url
    variables["store",] = f"file {where}"


def _validated(model: type[M], document: Document) -> M:
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        raise ConfigError(_lines(document, faults(error, model, document))) from None


def _catalogue_files(config: Config, document: Document, folder: FilePath) -> list[tuple[CatalogueSpec, Document]]:
    found: list[tuple[CatalogueSpec, Document]] = []
    errors: list[str] = []
    for index, name in enumerate(config.catalogue.files):
        try:
            extension = _read(str(folder / name))
        except ConfigError as error:
            if isinstance(error.__context__, OSError):
                why = f"cannot be read ({error.__context__.strerror}); check the path"
                errors.append(document.line(("catalogue", "files", index), why))
            else:
                errors += error.lines
            continue
        try:
            found.append((_validated(CatalogueSpec, extension), extension))
        except ConfigError as error:
            errors += error.lines
    if errors:
        raise ConfigError(errors)
    config._catalogue_files = tuple(spec for spec, _ in found)
    return found


def _catalogue_problems(
    config: Config, document: Document, files: Iterable[tuple[CatalogueSpec, Document]]
) -> Iterable[str]:
    merged = providers.packaged()
    for spec, source in files:
        merged = merge(merged, spec)
        yield from _lines(source, providers.problems(spec, merged))
    merged = merge(merged, config.catalogue)
    found = providers.problems(config.catalogue, merged)
    yield from _lines(document, ((("catalogue", *path), message) for path, message in found))


def _lines(document: Document, found: Iterable[tuple[Path, str]]) -> list[str]:
    ordered = sorted(found, key=lambda entry: document.position(entry[0]))
    return [document.line(path, message) for path, message in ordered]
