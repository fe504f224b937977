"""The layers of ``server/paceline`` go one way. The table below is the rule; the rest of the file checks it.

Imports are read from the source, so imports in functions and under ``TYPE_CHECKING`` count as well.
"""

from __future__ import annotations

import ast
import builtins
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SERVER = ROOT / "server" / "paceline"
CLIENT = ROOT / "clients" / "python" / "src" / "paceline_client"

# The modules of the engine that hold plain types: words that the other layers share with it.
ENGINE_TYPES = (
    "paceline.engine.accounting",
    "paceline.engine.answers",
    "paceline.engine.dimensions",
    "paceline.engine.events",
    "paceline.engine.operations",
    "paceline.engine.terms",
    "paceline.engine.types",
)
STUBS = "paceline_client.stubs"
ANYTHING = "*"


@dataclass(frozen=True, slots=True)
class Layer:
    """What one layer may import, beside itself, the standard library and ``paceline`` itself."""

    own: tuple[str, ...] = ()
    """Modules of this repository, each with all that is below it."""
    third_party: tuple[str, ...] = (ANYTHING,)
    pure: bool = False
    """No clock, no chance, no I/O: the deny-lists below hold."""


LAYERS = {
    "paceline.engine": Layer(third_party=("msgspec",), pure=True),
    "paceline.providers": Layer(own=("paceline.engine",)),
    "paceline.config": Layer(own=(*ENGINE_TYPES, "paceline.providers")),
    "paceline.ledger": Layer(own=("paceline.engine",)),
    "paceline.telemetry": Layer(own=ENGINE_TYPES),
    "paceline.frontend": Layer(
        own=(
            "paceline.engine",
            "paceline.ledger",
            "paceline.providers",
            "paceline.config",
            "paceline.telemetry",
            STUBS,
        )
    ),
    # The first row that fits rules: the simulator is pure but for its HTTP server.
    "paceline.upstream.http": Layer(own=("paceline.upstream",)),
    "paceline.upstream": Layer(third_party=("msgspec",), pure=True),
    "paceline.cli": Layer(own=(ANYTHING,)),
    "paceline.__main__": Layer(own=("paceline.cli",)),
}

# Standard modules that bring time, chance, the outside world or concurrency into a pure layer.
IMPURE_MODULES = frozenset(
    """
    _thread asyncio concurrent contextvars ctypes ftplib getpass glob http imaplib importlib io locale logging
    mmap multiprocessing os pathlib pickle platform poplib queue random sched secrets select selectors shelve
    shutil signal smtplib socket socketserver sqlite3 ssl subprocess tempfile threading time urllib weakref
    webbrowser
    """.split()  # noqa: SIM905
)
# The same, for names inside modules that are fine otherwise.
IMPURE_NAMES = frozenset(
    """
    datetime.date.today datetime.datetime.now datetime.datetime.today datetime.datetime.utcnow
    uuid.uuid1 uuid.uuid4 uuid.getnode
    sys.argv sys.stdin sys.stdout sys.stderr
    builtins.open builtins.print builtins.input builtins.eval builtins.exec builtins.breakpoint
    builtins.__import__
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True, slots=True)
class Import:
    """One imported name in full: ``from a.b import c`` is ``a.b.c``."""

    target: str
    line: int


def below(name: str, parent: str) -> bool:
    return name == parent or name.startswith(parent + ".")


def imports_of(tree: ast.AST, module: str, is_package: bool) -> Iterator[Import]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    yield Import(alias.name, node.lineno)
            case ast.ImportFrom(module=base, names=names, level=level):
                if level:
                    package = module.split(".")
                    package = package[: len(package) - level + is_package]
                    base = ".".join([*package, base] if base else package)
                for alias in names:
                    yield Import(f"{base}.{alias.name}", node.lineno)
            case ast.Call(func=func, args=[ast.Constant(value=str(target)), *_]):
                name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
                if name in {"import_module", "__import__"}:
                    yield Import(target, node.lineno)
            case _:
                pass


def names_used(tree: ast.AST) -> Iterator[Import]:
    """Every dotted name that is read, in full, through whatever alias it was imported under."""
    origin: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                head = alias.name.split(".")[0]
                origin[alias.asname or head] = alias.name if alias.asname else head
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                origin[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        parts: list[str] = []
        inner: ast.AST = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Load):
            head = origin.get(inner.id) or (f"builtins.{inner.id}" if hasattr(builtins, inner.id) else inner.id)
            yield Import(".".join([head, *reversed(parts)]), inner.lineno)


def layer_of(module: str) -> str | None:
    return next((name for name in LAYERS if below(module, name)), None)


def fault(name: str, layer: Layer, target: str) -> str | None:
    """Why ``target`` may not be imported in the layer called ``name``; None if it may."""
    top = target.split(".")[0]
    if top == "paceline":
        there = layer_of(target)
        if there == "paceline.cli" and "paceline.cli" not in layer.own and name != there:
            return "nothing imports the command line"
        if there is None or there == name:
            return "a star import hides what is used" if target == "paceline.*" else None
    elif top != "paceline_client":
        if top in sys.stdlib_module_names:
            impure = layer.pure and any(below(target, denied) for denied in IMPURE_MODULES | IMPURE_NAMES)
            return "not pure" if impure else None
        return None if ANYTHING in layer.third_party or top in layer.third_party else "not among its packages"
    if ANYTHING in layer.own or any(below(target, allowed) for allowed in layer.own):
        return None
    return "against the direction of the layers"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What in ``source``, as the text of ``module``, breaks the table."""
    tree = ast.parse(source)
    name = layer_of(module)
    # Modules at the root belong to every layer, so they may import none.
    layer = LAYERS[name] if name else Layer()
    found = {
        (entry.line, f"{module}:{entry.line}: {entry.target}: {why}")
        for entry in imports_of(tree, module, is_package)
        if (why := fault(name or "paceline", layer, entry.target))
    }
    if layer.pure:
        found |= {
            (entry.line, f"{module}:{entry.line}: {entry.target}: not pure")
            for entry in names_used(tree)
            if any(below(entry.target, denied) for denied in IMPURE_NAMES)
        }
    return [text for _, text in sorted(found)]


def modules(root: Path) -> Iterator[tuple[Path, str, bool]]:
    """Each source file of a package: path, dotted name, whether it is a package's ``__init__``."""
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root.parent).with_suffix("").parts
        is_package = parts[-1] == "__init__"
        yield path, ".".join(parts[:-1] if is_package else parts), is_package


def test_imports_follow_the_layers() -> None:
    found = [
        text
        for path, module, is_package in modules(SERVER)
        for text in violations(path.read_text(encoding="utf-8"), module, is_package)
    ]
    assert not found, "\n" + "\n".join(found)


def test_every_package_has_a_layer() -> None:
    packages = {f"paceline.{entry.name}" for entry in SERVER.iterdir() if entry.is_dir() and any(entry.rglob("*.py"))}
    assert packages <= LAYERS.keys(), "a new package needs a row in LAYERS"


def test_client_stands_alone() -> None:
    found = [
        f"{module}:{entry.line}: {entry.target}"
        for path, module, is_package in modules(CLIENT)
        if not below(module, STUBS)
        for entry in imports_of(ast.parse(path.read_text(encoding="utf-8")), module, is_package)
        if below(entry.target, "paceline")
    ]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("paceline.engine.pool", "import time"),
        ("paceline.engine.pool", "import os.path as p"),
        ("paceline.engine.pool", "from random import Random"),
        ("paceline.engine.pool", "def f():\n    import asyncio"),
        ("paceline.engine.pool", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket"),
        ("paceline.engine.pool", "from uuid import uuid4"),
        ("paceline.engine.pool", "import uuid as u\nx = u.uuid4()"),
        ("paceline.engine.pool", "from datetime import datetime as dt\nnow = dt.now()"),
        ("paceline.engine.pool", "import datetime\nclock = datetime.datetime.now"),
        ("paceline.engine.pool", "print('x')"),
        ("paceline.engine.pool", "import grpc"),
        ("paceline.engine.pool", "from paceline.ledger import journal"),
        ("paceline.engine.pool", "from ..ledger import journal"),
        ("paceline.engine.pool", "from .. import config"),
        ("paceline.engine", "from ..ledger import journal"),
        ("paceline.providers.openai", "import paceline.config.models"),
        ("paceline.config.models", "from paceline.engine.engine import Engine"),
        ("paceline.config.models", "from paceline.ledger import owner"),
        ("paceline.ledger.owner", "from paceline import frontend"),
        ("paceline.ledger.owner", "from paceline.providers import openai"),
        ("paceline.ledger.owner", "from paceline_client.stubs import x"),
        ("paceline.telemetry.metrics", "from paceline.engine.engine import Engine"),
        ("paceline.telemetry.metrics", "import paceline.ledger"),
        ("paceline.frontend.rpc", "from paceline.cli import main"),
        ("paceline.frontend.rpc", "import importlib\nimportlib.import_module('paceline.cli.main')"),
        ("paceline.frontend.rpc", "from paceline_client import Client"),
        ("paceline.frontend.rpc", "from paceline import *"),
        ("paceline.upstream.bucket", "import time"),
        ("paceline.upstream.account", "from paceline.upstream.http import Upstream"),
        ("paceline.upstream.http.server", "from paceline.engine.bucket import Bucket"),
        ("paceline.version", "import paceline.engine"),
        ("paceline", "from .frontend import rpc"),
    ],
)
def test_checker_catches(module: str, source: str) -> None:
    assert violations(source, module, is_package=module in {"paceline", "paceline.engine"})


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("paceline.engine.pool", "import bisect, heapq, math, msgspec\nfrom uuid import UUID"),
        ("paceline.engine.pool", "from .dimensions import Dimension\nfrom paceline.engine import answers"),
        ("paceline.engine.pool", "from datetime import datetime, timedelta\nx = datetime(2024, 1, 1)"),
        ("paceline.engine.pool", "def f(now, time):\n    return now - time.now()"),
        ("paceline.providers.openai", "from paceline.engine.accounting import Profile\nimport os, yaml"),
        ("paceline.config.models", "from paceline.engine.dimensions import Limit\nimport pydantic"),
        ("paceline.ledger.owner", "from paceline.engine.engine import Engine\nimport asyncio, time"),
        ("paceline.frontend.rpc", "from paceline_client.stubs.v1 import x\nfrom paceline import __version__"),
        ("paceline.upstream.http.server", "import time, aiohttp\nfrom paceline.upstream import Account"),
        ("paceline.cli.serve", "import paceline_client\nfrom paceline.frontend import rpc"),
        ("paceline.__main__", "from paceline.cli import main"),
    ],
)
def test_checker_accepts(module: str, source: str) -> None:
    assert violations(source, module) == []
