"""An ideal bucket: what nobody can beat who lets calls in by the order of their coming."""

from __future__ import annotations

from collections.abc import Sequence

from bench.lab.clock import EPOCH, SECOND
from bench.lab.fleet import Task
from bench.lab.setting import Setting
from paceline.upstream.bucket import Bucket


def waits(tasks: Sequence[Task], setting: Setting) -> list[float]:
    """Seconds that each call waits, in order of arrival, where all is known: levels, sizes, the upstream's estimates.

    A call goes when all before it have gone and the upstream would let it in; it is charged what it will have cost.
    """
    buckets = {}
    for name, amount in setting.limits.items():
        burst = max(1, int(amount * setting.burst_seconds / 60))
        buckets[name] = Bucket.of(EPOCH, amount, burst, int(burst * setting.initial))
    found, now = [], EPOCH
    for task in tasks:
        now = max(now, task.begun)
        fresh = task.size.input - task.size.cached
        needs = {"requests": 1, "input_tokens": round(fresh * setting.their_bias), "output_tokens": 1}
        for bucket in buckets.values():
            bucket.advance(now)
        now += max(buckets[name].wait_us(need) for name, need in needs.items())
        charges = {"requests": 1, "input_tokens": fresh, "output_tokens": task.size.output}
        for name, bucket in buckets.items():
            bucket.advance(now)
            bucket.charge(charges[name])
        found.append((now - task.begun) / SECOND)
    return found
