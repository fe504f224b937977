"""YAML with positions: what a file says, and on which line it says it.

A stricter YAML than the library's: no tags, no merge keys, no two equal keys, and plain scalars are text
unless they are ``true``, ``false``, ``null`` or a decimal number (so ``on``, ``12:30`` and ``2026-04-01``
stay text).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import yaml

from paceline.providers.catalogue import Path

MAX_BYTES = 4 * 1024 * 1024
MAX_VALUES = 100_000
MAX_DEPTH = 64


class ConfigError(Exception):
    """A configuration that cannot be used. ``lines`` says why, one line for each fault."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = lines


@dataclass
class Document:
    """A file's content and where each value stands. Overlaid values stand elsewhere, under ``sources``."""

    name: str
    data: object
    lines: dict[Path, int] = field(default_factory=dict)
    sources: dict[Path, str] = field(default_factory=dict)

    def locate(self, path: Path) -> Path:
        """The longest part of ``path`` that stands in the file, without steps that the file does not have."""
        found: Path = ()
        for step in path:
            if (*found, step) in self.lines or (*found, step) in self.sources:
                found = (*found, step)
        return found

    def line(self, path: Path, message: str) -> str:
        """One line of report about ``path``."""
        place = self.locate(path)
        where = self.sources.get(place) or f"{self.name}:{self.lines.get(place, 1)}"
        # A list of one may be written without being a list; then its only item has no number.
        shown: Path = ()
        for step in path:
            if isinstance(step, str) or (*shown, step) in self.lines:
                shown = (*shown, step)
        return f"{where}: {dotted(shown) or 'file'}: {message}"

    def position(self, path: Path) -> int:
        """For sorting reports."""
        return self.lines.get(self.locate(path), 0)


def dotted(path: Path) -> str:
    """A path as people write it: ``ladders.chat[0].model``."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        else:
            shown = step if step.isprintable() else ascii(step)
            text += f".{shown}" if text else shown
    return text


def read(name: str, raw: bytes) -> Document:
    """Read a file's content. Raises :class:`ConfigError`."""
    if len(raw) > MAX_BYTES:
        raise ConfigError([f"{name}:1: file: is larger than {MAX_BYTES >> 20} MiB; split or shorten it"])
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{name}:{line}: file: is not UTF-8 text; save it as UTF-8"]) from None
    try:
        node = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = ", ".join(part for part in (error.context, error.problem) if part)
        line = mark.line + 1 if mark else 1
        raise ConfigError([f"{name}:{line}: file: {what}; correct the YAML"]) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, int(error.position)) + 1
        raise ConfigError([f"{name}:{line}: file: has a character that YAML forbids; remove it"]) from None
    except RecursionError:
        raise ConfigError([f"{name}:1: file: is nested too deeply; flatten it"]) from None
    document = Document(name, {})
    if node is not None:
        builder = _Builder(document)
        document.data = builder.build(node, ())
        if builder.faults:
            raise ConfigError(builder.faults)
    if document.data is None:
        document.data = {}
    return document


class _Loader(yaml.SafeLoader):
    """The parser, with fewer surprises in plain scalars."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(?:~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9][0-9_]{0,30}$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9][0-9_]{0,30})?\.[0-9]{1,30}(?:[eE][-+]?[0-9]{1,2})?$"),
    list("-+.0123456789"),
)


class _Builder:
    """Turns nodes into values and notes their lines."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.faults: list[str] = []
        self._open: set[int] = set()
        self._values = 0

    def build(self, node: yaml.Node, path: Path) -> object:
        line = node.start_mark.line + 1
        self.document.lines.setdefault(path, line)
        self._values += 1
        if self._values > MAX_VALUES:
            if self._values == MAX_VALUES + 1:
                self._fault(line, path, f"has more than {MAX_VALUES:,} values, aliases included; shorten it")
            return None
        if id(node) in self._open:
            self._fault(line, path, "contains itself, a cycle through an alias; write it out")
            return None
        if len(path) > MAX_DEPTH:
            self._fault(line, path, "is nested too deeply; flatten it")
            return None
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, line, path)
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode) and node.tag == "tag:yaml.org,2002:seq":
                return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]
            if isinstance(node, yaml.MappingNode) and node.tag == "tag:yaml.org,2002:map":
                return self._mapping(node, path)
        finally:
            self._open.discard(id(node))
        self._fault(line, path, f"has the tag {node.tag!r}; tags are not supported, remove it")
        return None

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, object]:
        found: dict[str, object] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "a list or mapping"
                self._fault(line, path, f"the key {shown!r} is not text; put it in quotes")
                continue
            if key == "<<" and key_node.style is None:
                self._fault(line, path, "merge keys (<<) are not supported; write the values out")
                continue
            if key in first:
                self._fault(line, (*path, key), f"stands twice, first on line {first[key]}; keep one")
                continue
            first[key] = line
            self.document.lines[(*path, key)] = line
            found[key] = self.build(value_node, (*path, key))
        return found

    def _scalar(self, node: yaml.ScalarNode, line: int, path: Path) -> object:
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        plain = node.style is None
        if kind == "str":
            return text
        if plain and kind == "null":
            return None
        if plain and kind == "bool" and text in ("true", "false"):
            return text == "true"
        try:
            if plain and kind == "int" and len(text) <= 32:
                return int(text.replace("_", ""))
            if plain and kind == "float" and len(text) <= 72:
                return float(text.replace("_", ""))
        except ValueError:
            pass
        self._fault(line, path, f"has the tag {node.tag!r}; tags are not supported, remove it")
        return None

    def _fault(self, line: int, path: Path, message: str) -> None:
        self.faults.append(f"{self.document.name}:{line}: {dotted(path) or 'file'}: {message}")
