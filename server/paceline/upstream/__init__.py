"""A simulator of upstream LLM APIs: what they count, when they refuse, what their headers say.

It is an independent model, and shares nothing with the coordinator. This package is pure: no I/O, no clock, no
randomness of its own, so it runs under a laboratory's virtual clock as well as behind HTTP, which is in
:mod:`paceline.upstream.http`.

=====================  ==================================================================
:mod:`~.bucket`        one continuous token bucket, exact, with outside traffic
:mod:`~.account`       admission and charges of one organisation, the log
:mod:`~.truth`         totals, marks, :func:`~.truth.limit_used`
:mod:`~.headers`       what responses say of the limits
:mod:`~.errors`        bodies of errors
:mod:`~.tokens`        tokens of a text, and texts of so many tokens
:mod:`~.prompt`        from a request's body to its tokens, cached prefixes included
:mod:`~.settings`      what is simulated, and what goes wrong
=====================  ==================================================================

What it does not simulate, so that no result measured here says anything of it:

- Anthropic: the 429 of a spend cap, which has a code of its own and no ``retry-after`` (a scenario can leave
  ``retry-after`` out of a forced refusal, which still names a bucket); limits of workspaces beside those of the
  organisation. A ramp limit is there, but how the real one counts is not known: here it is a bucket like the others.
- OpenAI: limits by the day (RPD, TPD); limits of projects and the ``…-project-tokens`` headers; ``slow_down``,
  ``insufficient_quota`` and the codes of spend limits.
- Azure OpenAI: requests that are enforced in slices of 1 or 10 seconds; headers that say ``-1`` or are missing for one
  dimension only (a scenario leaves out all of them or none).
- The APIs of other providers.
"""

from __future__ import annotations

from paceline.upstream.account import Accepted, Account, Call, Overloaded, Refused
from paceline.upstream.settings import Config, Group, Ramp, Scenario, SettingsError
from paceline.upstream.truth import Mark, Used, limit_used, mark

__all__ = [
    "Accepted",
    "Account",
    "Call",
    "Config",
    "Group",
    "Mark",
    "Overloaded",
    "Ramp",
    "Refused",
    "Scenario",
    "SettingsError",
    "Used",
    "limit_used",
    "mark",
]
