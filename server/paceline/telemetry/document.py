"""``docs/metrics.md``, made from the table of the metrics: ``python -m paceline.telemetry.document [FILE]``."""

from __future__ import annotations

import sys
from pathlib import Path

from paceline.telemetry.definitions import LABELS, METRICS
from paceline.telemetry.endpoint import COLLECT_TIMEOUT_S, MAX_CONNECTIONS
from paceline.telemetry.metrics import MAX_POOLS, OTHER

_UNITS = {
    "s": "seconds",
    "By": "bytes",
    "1": "0 or 1",
    "{USD}": "US dollars",
    "{unit}": "that of the dimension",
    "{batch}": "batches",
    "{watch}": "watches",
}


_PAGE = """\
# Metrics

Made from the code by `python -m paceline.telemetry.document docs/metrics.md`; a test compares them.

`paceline serve` offers them at `http://HOST:PORT/metrics`, in the text format of Prometheus or in that of OpenMetrics.
`--metrics-listen` (`PACELINE_METRICS_LISTEN`, `metrics_listen` in the file) says where; `off` turns it off. The
endpoint has no authentication: keep it on a private address. Nothing is measured on the way of a call: counters are
plain integers, and metrics are made from them when somebody reads.

| metric | type | unit | labels | meaning |
|---|---|---|---|---|
{metrics}

In OpenTelemetry's terms the names have dots between words, and no suffix for the unit or `total`. Amounts of the
dimension `spend` are US dollars. With them come `target_info`, which names the version, and the `process_*` metrics of
the Prometheus client (CPU, memory, open files).

Counters of decisions start at zero with the process, and again when a ledger is read from its journal; the sums that
say “since the ledger began” are part of the books, and survive both.

## Labels

| label | values |
|---|---|
{labels}

## Bounds

- The first {pools} pools have series of their own. Of any more, counters and histograms are added up under
  `pool="{other}"`, and gauges are left out.
- Tenants, shares, routes, identities and reservations are never labels, because there is no bound to them.
  `AdminService` shows them.
- At most {readers} readers at a time. A reader gets 503 if the server does not answer within {seconds:.0f} seconds.
"""


def markdown() -> str:
    """The text of the page."""
    metrics: list[str] = []
    for metric in METRICS:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        unit = _UNITS.get(metric.unit) or metric.unit.strip("{}") + "s"
        metrics.append(f"| `{metric.exported}` | {metric.kind.value} | {unit} | {labels} | {metric.description} |")
    return _PAGE.format(
        metrics="\n".join(metrics),
        labels="\n".join(f"| `{label}` | {values} |" for label, values in LABELS.items()),
        pools=MAX_POOLS,
        other=OTHER,
        readers=MAX_CONNECTIONS,
        seconds=COLLECT_TIMEOUT_S,
    )


def main(arguments: list[str]) -> None:
    """Write the page to a file, or to standard output."""
    if arguments:
        Path(arguments[0]).write_text(markdown(), encoding="utf-8")
    else:
        sys.stdout.write(markdown())


if __name__ == "__main__":
    main(sys.argv[1:])
