"""Upstreams whose headers say no more than how long to wait."""

from __future__ import annotations

from collections import Counter

from paceline.engine.operations import Observation
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.observing import observation


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    return observation(response, (), ignored)


FAMILIES = (Family(name="retry-after", wanted=COMMON, parse=_parse),)
