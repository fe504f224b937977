"""The upstream's side: the simulated account, answers that take their time, headers through the real parser."""

from __future__ import annotations

import random
from collections.abc import Callable
from email.utils import formatdate

from bench.lab.clock import SECOND, Clock
from bench.lab.setting import MODEL, Setting
from paceline.engine.operations import Observation
from paceline.providers.headers import parse
from paceline.upstream import Account, Call, Config, Group, Refused
from paceline.upstream.account import Outcome
from paceline.upstream.errors import anthropic_code, anthropic_refusal
from paceline.upstream.headers import limit_headers, retry_headers

GROUP = "models"
_ERRORS = {429: "rate_limit_error", 529: "overloaded_error"}


class Service:
    """One account of the upstream."""

    def __init__(self, clock: Clock, setting: Setting) -> None:
        self._clock = clock
        self._setting = setting
        group = Group(name=GROUP, models=("claude-*",), limits=dict(setting.limits))  # type: ignore[arg-type]
        config = Config(
            groups=(group,),
            burst_seconds=setting.burst_seconds,
            initial=setting.initial,
            estimate_spread=setting.their_spread,
            log_calls=1_000_000,
            seed=setting.seed,
        )
        self.account = Account(clock.now, config, random.Random(setting.seed))
        self.changed_at = 0
        """When the rules last changed, or traffic of others began or ended."""
        if setting.outside:
            self.outside(setting.outside)
        if setting.ramp is not None:
            self._change(ramps={"*": {"start": setting.ramp.start, "step": setting.ramp.step}})
        if not setting.headers:
            self.account.change(clock.now, headers=False)

    # -- what happens to it -------------------------------------------------------------------------------------------

    def outside(self, part: float) -> None:
        """Others use so much of every limit from now on."""
        self._change(outside={"*": {name: round(part * amount) for name, amount in self._setting.limits.items()}})

    def limits(self, part: float) -> None:
        """The limits are so much of the first ones from now on."""
        self._change(limits={"*": {name: round(part * amount) for name, amount in self._setting.limits.items()}})

    def overload(self, seconds: float) -> None:
        """All calls are answered 529."""
        self._change(overload_probability=1.0, overload_seconds=seconds)

    def _change(self, **fields: object) -> None:
        self.account.change(self._clock.now, **fields)
        self.changed_at = self._clock.now

    # -- calls --------------------------------------------------------------------------------------------------------

    def arrive(self, call: Call) -> Outcome:
        """A call comes in."""
        return self.account.arrive(self._clock.now, call)

    def produce(self, call: Call, goes_on: Callable[[], bool], done: Callable[[], None]) -> None:
        """Produce the answer of a call that has begun; stop when it no longer ``goes_on``, else say when it is
        ``done``."""
        setting, clock = self._setting, self._clock
        piece = max(1, round(setting.tokens_per_second * setting.chunk_s))

        def more() -> None:
            tokens = min(piece, call.output - call.produced)
            clock.after(tokens / setting.tokens_per_second, lambda: produced(tokens))

        def produced(tokens: int) -> None:
            if not goes_on():
                return
            self.account.produced(clock.now, call, tokens)
            if call.produced < call.output:
                more()
                return
            self.account.ended(clock.now, call, "finished")
            done()

        more()

    # -- headers ------------------------------------------------------------------------------------------------------

    def headers(self) -> dict[str, str]:
        """What a response says now."""
        found = limit_headers(self.account, self.account.groups[GROUP], self._clock.now, 0)
        return {**found, "date": formatdate(self._clock.now // SECOND, usegmt=True)}

    def refusal(self, refused: Refused) -> tuple[dict[str, str], str, str]:
        """Headers, message and code of a 429."""
        message = anthropic_refusal(refused, self.account.config.organization, MODEL)
        return {**self.headers(), **retry_headers(refused, "anthropic")}, message, anthropic_code(refused)


def read(
    family: str, headers: dict[str, str], status: int = 200, message: str = "", code: str = "", age_us: int = 0
) -> Observation | None:
    """What the coordinator reads in a response, reported ``age_us`` after it had come."""
    pairs = [(name, value.encode()) for name, value in headers.items()]
    return parse(family, pairs, status, _ERRORS.get(status, ""), message, None, age_us, error_code=code)
