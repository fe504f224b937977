"""A small service that calls a simulated API: each call reserves first, and commits what it used.

The environment names the API (``UPSTREAM``), Paceline (``PACELINE_ADDRESS``) and how many calls go at once
(``CALLERS``). It runs until it is stopped, or for ``SECONDS``; exit code 1 if no call was answered.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

from paceline_client import Client, Denied, Priority, Unavailable

MODEL = "claude-sonnet-5"
PRIORITIES: tuple[Priority, ...] = ("interactive", "standard", "batch")
WAIT_S = 30.0
TIMEOUT_S = 60.0
REPORT_S = 10.0
BUDGET_S = 2.0
"""For the coordinator to answer: everything runs on one small machine."""


def call(paceline: Client, upstream: str, priority: Priority) -> str:
    """One call; what became of it."""
    size, bound = random.randint(50, 2_000), random.randint(20, 300)
    body = {"model": MODEL, "max_tokens": bound, "messages": [{"role": "user", "content": "word " * size}]}
    request = urllib.request.Request(  # noqa: S310 -- the address is the operator's own
        f"{upstream}/v1/messages",
        json.dumps(body).encode(),
        {"content-type": "application/json", "anthropic-version": "2023-06-01", "x-api-key": "simulated"},
    )
    try:
        with paceline.reserve(
            model=MODEL,
            input_tokens=size,
            max_output_tokens=bound,
            tenant=priority,
            priority=priority,
            max_wait=WAIT_S,
        ) as grant:
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
                    headers, usage = dict(answer.headers.items()), json.load(answer)["usage"]
            except urllib.error.HTTPError as error:
                grant.commit_usage(headers=dict(error.headers.items()), status=error.code)
                return f"refused {error.code}"
            grant.commit_usage(
                input_tokens=usage["input_tokens"], output_tokens=usage["output_tokens"], headers=headers
            )
            return "answered"
    except Denied:
        return "denied"
    except Unavailable:
        return "uncoordinated"
    except OSError as error:
        return type(error).__name__


def main() -> int:
    """Call until the time is over; the exit code."""
    upstream = os.environ.get("UPSTREAM", "http://127.0.0.1:7180").rstrip("/")
    until = time.monotonic() + float(os.environ.get("SECONDS") or "inf")
    fates: Counter[str] = Counter()
    paceline = Client(budget=BUDGET_S)

    def work(number: int) -> None:
        while time.monotonic() < until:
            fates[call(paceline, upstream, PRIORITIES[number % len(PRIORITIES)])] += 1
            time.sleep(random.expovariate(2.0))

    callers = int(os.environ.get("CALLERS") or 6)
    workers = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(callers)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        workers[0].join(min(REPORT_S, max(0.1, until - time.monotonic())))
        sys.stdout.write(json.dumps(dict(fates)) + "\n")
        sys.stdout.flush()
        if time.monotonic() >= until + TIMEOUT_S + WAIT_S:
            break
    paceline.close()
    return 0 if fates["answered"] else 1


if __name__ == "__main__":
    sys.exit(main())
