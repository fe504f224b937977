"""Amazon Bedrock: no header tells a limit, but one the kind of an error."""

from __future__ import annotations

from collections import Counter

from paceline.engine.operations import Observation
from paceline.providers.headers.family import COMMON, Family, Response
from paceline.providers.headers.fault import AMAZON_TYPE
from paceline.providers.headers.observing import observation


def _parse(response: Response, ignored: Counter[str]) -> Observation | None:
    return observation(response, (), ignored)


FAMILIES = (Family(name="bedrock", wanted=COMMON | {AMAZON_TYPE}, parse=_parse),)
