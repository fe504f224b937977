"""What an application saw of one call."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from tests.hooks_matrix.world import until


class Interrupted(BaseException):
    """As Ctrl-C is, for an application that blocks."""


@dataclass
class Seen:
    """Gathered by the application itself, from the SDK's objects."""

    text: list[str] = field(default_factory=list)
    """Pieces as they came, of tools' arguments too."""
    usage: list[Any] = field(default_factory=list)
    """Each usage that it was shown."""
    kinds: list[str] = field(default_factory=list)
    """Of the events."""
    other: list[Any] = field(default_factory=list)
    """Identifiers, stop reasons, headers."""
    error: BaseException | None = None
    attempts: int = 0
    """By the upstream's log."""

    @property
    def failure(self) -> tuple[object, ...]:
        """The error, as far as a program can tell."""
        error = self.error
        body = getattr(error, "body", None)
        return type(error), str(error), getattr(error, "status_code", None), body

    @property
    def whole(self) -> tuple[object, ...]:
        """All of it."""
        return self.text, self.usage, self.kinds, self.other, self.failure, self.attempts

    @property
    def rough(self) -> tuple[object, ...]:
        """What does not depend on how fast the machine is, where an answer was cut off."""
        return self.usage[:1], self.kinds[:3], self.other[:1], self.failure, self.attempts


@contextmanager
def interrupted_when(condition: Callable[[], object]) -> Iterator[None]:
    """Interrupt what this thread, the main one, is doing once the condition holds."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    def watch() -> None:
        until(condition, "a call to interrupt")
        signal.pthread_kill(main, signal.SIGUSR1)

    main = threading.get_ident()
    before = signal.signal(signal.SIGUSR1, interrupt)
    watcher = threading.Thread(target=watch, daemon=True)
    try:
        watcher.start()
        yield
    finally:
        watcher.join(20)
        signal.signal(signal.SIGUSR1, before)
