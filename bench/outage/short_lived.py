"""``paceline`` with fallback shares that live so briefly that an outage of less than a minute outlives them."""

from __future__ import annotations

from bench.outage import LIFE_SECONDS
from paceline.engine.dimensions import SECOND_US
from paceline.frontend import limits

# Before anything takes its value from there.
limits.FALLBACK_EXPIRY_US = LIFE_SECONDS * SECOND_US
limits.FALLBACK_GRACE_US = 2 * SECOND_US

if __name__ == "__main__":
    from paceline.cli import main

    main()
