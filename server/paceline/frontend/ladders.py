"""Lists of candidates that stand on the server: a name may mean another list by the call's tenant and priority."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from paceline.config import Config, expand_ladder
from paceline.engine.accounting import Estimate
from paceline.engine.operations import Priority
from paceline.frontend.places import Destination, Places
from paceline.providers import Target
from paceline_client.stubs import v1 as pb

_PRIORITIES: Mapping[str | None, Priority | None] = {
    None: None,
    "interactive": Priority.INTERACTIVE,
    "standard": Priority.STANDARD,
    "batch": Priority.BATCH,
}
Rule = tuple[str, str, Priority | None]
"""A name, a tenant (empty: every) and a priority (``None``: each)."""


class Ladder(NamedTuple):
    """A named list of candidates of this server."""

    rungs: tuple[tuple[Destination, Estimate, int | None], ...]
    """Destination, what the server knows of the size, and the smallest ``max_output_tokens`` to grant."""


class Ladders:
    """``named``: what each name means, unless one of the ``rules`` says otherwise, of which the most specific wins."""

    def __init__(self, named: Mapping[str, Ladder] | None = None, rules: Mapping[Rule, Ladder] | None = None) -> None:
        self._named = dict(named or {})
        self._rules = dict(rules or {})

    def find(self, name: str, tenant: str, priority: Priority) -> Ladder | None:
        """What a name means for a call."""
        rules = self._rules
        if rules:
            for rule in ((name, tenant, priority), (name, tenant, None), (name, "", priority)):
                found = rules.get(rule)
                if found is not None:
                    return found
        return self._named.get(name)


def ladders_of(config: Config, places: Places) -> Ladders:
    """The ladders of a configuration that was checked."""
    named = {name: _ladder(config, name, places) for name in config.ladders}
    rules = {(rule.ladder, rule.tenant, _PRIORITIES[rule.priority]): named[rule.use] for rule in config.ladder_rules}
    return Ladders(named, rules)


def _ladder(config: Config, name: str, places: Places) -> Ladder:
    rungs = []
    for rung in expand_ladder(config, name):
        target = pb.Target(**Target._asdict(rung.target))
        destination = places.destination(target.SerializeToString(), target, f"ladders.{name}")
        rungs.append((destination, Estimate(max_output_tokens=rung.max_output_tokens), rung.min_output_tokens))
    return Ladder(tuple(rungs))
