"""A call with the caller's own continuation: what to do instead, where the call as asked for is denied.

A :class:`Walk` says what to ask for next and reads the decisions; it neither waits nor asks. One deadline holds for
all steps together. A step that says how long the one before it is worth waiting for (``after``) bounds that one's wait;
else each may wait as long as is left, and the server denies at once what it cannot serve within it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Generic, TypeVar

from paceline_client._errors import Denied, Unavailable
from paceline_client._estimate import estimate_tokens
from paceline_client._grant import Grant
from paceline_client._model import Candidate
from paceline_client._plan import Plan

__all__ = ["Answer", "Local", "Step", "Turn", "Walk"]

T = TypeVar("T")

MAX_STEPS: Final = 32
_FINAL: Final = frozenset({"released"})
"""Denials that the caller has brought about: no other step would be wanted."""
_TARGETS: Final = ("model", "candidates", "ladder")
_SIZES: Final = (
    "input_tokens",
    "cached_input_tokens",
    "output_tokens",
    "max_output_tokens",
    "min_output_tokens",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Another way to make the call. What is left out is as in the call itself. Unit of all sizes: tokens."""

    prompt: Any = field(default=None, repr=False)
    """A shorter one, say: handed to the caller's function. Without ``input_tokens`` its size is estimated."""
    model: str = ""
    """At the provider and account of the call, if that names any."""
    candidates: Sequence[Candidate] = ()
    ladder: str = ""
    input_tokens: int | None = None
    cached_input_tokens: int | None = None
    output_tokens: int | None = None
    max_output_tokens: int | None = None
    min_output_tokens: int | None = None
    after: float | None = None
    """How long the step before this one is worth waiting for. ``None``: as long as is left. Unit: seconds."""


@dataclass(frozen=True, slots=True)
class Local:
    """An answer without a call, such as one from a cache. Always the last step, because it is never denied."""

    answer: Any = field(repr=False)
    """The answer, or a function without arguments that makes it; for :class:`AsyncClient` it may be awaitable."""
    after: float | None = None
    """How long the step before this one is worth waiting for. ``None``: as long as is left. Unit: seconds."""


@dataclass(frozen=True, slots=True)
class Turn:
    """What the caller's function gets: the permission for one call, and with what to make it."""

    grant: Grant
    step: int
    """0: the call as asked for; n: the n-th of ``steps``."""
    prompt: Any = field(repr=False)
    """That of the step, else that of the call."""
    client: Any = field(repr=False)
    """The entry of ``accounts`` for the granted account. ``None``: none were given."""
    asked_output_tokens: int | None = None
    """The bound for the output that was asked for."""

    @property
    def model(self) -> str:
        """The granted model. Empty only where nobody has said which, as for a ladder with a client that is disabled."""
        return self.grant.target.model

    @property
    def max_output_tokens(self) -> int | None:
        """The bound that the call must carry. ``None``: nobody has named one."""
        bound = self.grant.max_output_tokens
        return self.asked_output_tokens if bound is None else bound


@dataclass(frozen=True, slots=True)
class Answer(Generic[T]):
    """What came of a call with steps."""

    value: T = field(repr=False)
    """What the caller's function returned, or the local answer."""
    step: int
    """The step that was taken. 0: the call as asked for; n: the n-th of ``steps``."""
    grant: Grant | None
    """``None``: a local answer."""
    passed: tuple[Denied | Unavailable, ...] = ()
    """Why the steps before it were not taken, in order."""


class Walk:
    """The way of one call through its steps."""

    def __init__(
        self,
        asked: Plan,
        prompt: object,
        steps: Sequence[Step | Local],
        accounts: Mapping[str, Any] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ``ValueError`` or ``TypeError`` for steps that make no sense, before anything is asked."""
        if not asked.raise_on_denial:
            raise ValueError("call() has no raise_on_denial: give it a Local answer as the last step")
        self._steps = _checked(steps)
        self._asked = asked
        self._prompt = prompt
        self._accounts = accounts
        self._clock = clock
        self._ends = clock() + asked.max_wait
        self._at = 0
        self._plan = asked
        self.passed: list[Denied | Unavailable] = []

    def asked(self) -> Plan | None:
        """What to ask for now. ``None``: nothing, a local answer is due."""
        step = self._step
        if isinstance(step, Local):
            return None
        plan = _planned(self._asked, self._prompt, step)
        self._plan = plan
        wait = max(0.0, self._ends - self._clock())
        if self._at < len(self._steps):
            after = self._steps[self._at].after
            wait = wait if after is None else min(wait, after)
        return replace(plan, max_wait=wait)

    def turn(self, decision: list[Grant] | Denied | Unavailable) -> Turn | None:
        """The caller's turn. ``None``: on to the next step.

        Raises the denial where there is none, with the one before it as its cause; and ``UnmappedAccount``.
        """
        if isinstance(decision, (Denied, Unavailable)):
            before = self.passed[-1] if self.passed else None
            if self._at == len(self._steps) or (isinstance(decision, Denied) and decision.reason in _FINAL):
                raise decision from before
            self.passed.append(decision)
            self._at += 1
            return None
        grant, step = decision[0], self._step
        client = None if self._accounts is None else grant.choose(self._accounts)
        own = None if step is None or isinstance(step, Local) else step.prompt
        index = grant.candidate_index if not self._plan.ladder else 0
        bound = self._plan.candidates[index].max_output_tokens if index < len(self._plan.candidates) else None
        return Turn(grant, self._at, self._prompt if own is None else own, client, bound)

    def local(self) -> Any:
        """The local answer. Awaitable if the caller's function has made it so."""
        step = self._step
        answer = step.answer if isinstance(step, Local) else None
        return answer() if callable(answer) else answer

    def answer(self, value: T, turn: Turn | None) -> Answer[T]:
        """The result of the whole."""
        return Answer(value, self._at, None if turn is None else turn.grant, tuple(self.passed))

    @property
    def _step(self) -> Step | Local | None:
        return self._steps[self._at - 1] if self._at else None


def _checked(steps: Sequence[Step | Local]) -> tuple[Step | Local, ...]:
    found = tuple(steps)
    if len(found) > MAX_STEPS:
        raise ValueError(f"a call has at most {MAX_STEPS} steps")
    for number, step in enumerate(found, 1):
        if not isinstance(step, (Step, Local)):
            raise TypeError(f"step {number} is neither a Step nor a Local answer")
        if step.after is not None and not step.after >= 0:
            raise ValueError(f"step {number}: after must not be negative")
        if isinstance(step, Local):
            if number < len(found):
                raise ValueError(f"step {number} is a Local answer, which is never denied: nothing comes behind it")
            continue
        if sum(bool(getattr(step, name)) for name in _TARGETS) > 1:
            raise ValueError(f"step {number}: give at most one of {', '.join(_TARGETS)}")
        changed = [getattr(step, name) for name in _SIZES] + [getattr(step, name) or None for name in _TARGETS]
        if step.prompt is None and all(value is None for value in changed):
            raise ValueError(f"step {number} asks for the same as the call itself")
    return found


def _planned(asked: Plan, prompt: object, step: Step | Local | None) -> Plan:
    """The call as asked for, or as a step changes it."""
    if not isinstance(step, Step):
        return asked if prompt is None else replace(asked, candidates=_estimated(asked.candidates, prompt, anew=False))
    candidates, ladder, first = asked.candidates, asked.ladder, asked.candidates[0]
    if step.candidates:
        candidates, ladder = tuple(step.candidates), ""
    elif step.model:
        candidates, ladder = (replace(first, model=step.model),), ""
    elif step.ladder:
        candidates, ladder = (Candidate("", **{name: getattr(first, name) for name in _SIZES}),), step.ladder
    if step.prompt is not None:
        candidates = _estimated(candidates, step.prompt, anew=not step.candidates)
    elif prompt is not None:
        candidates = _estimated(candidates, prompt, anew=False)
    sizes = {name: getattr(step, name) for name in _SIZES if getattr(step, name) is not None}
    if sizes:
        candidates = tuple(replace(each, **sizes) for each in candidates)
    return replace(asked, candidates=candidates, ladder=ladder)


def _estimated(candidates: Sequence[Candidate], prompt: object, *, anew: bool) -> tuple[Candidate, ...]:
    """With the size of the prompt, where none is given; ``anew``: everywhere, since the given one was another's."""
    found = []
    for each in candidates:
        if anew or each.input_tokens is None:
            cached = None if anew else each.cached_input_tokens
            size = max(0, estimate_tokens(prompt, each.model or None) - (cached or 0))
            found.append(replace(each, input_tokens=size, cached_input_tokens=cached))
        else:
            found.append(each)
    return tuple(found)
