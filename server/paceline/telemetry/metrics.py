"""The instruments: OpenTelemetry's observable ones, which read figures when they are collected and cost nothing before.

OpenTelemetry has no observable histogram, so the cells of ours, counted elsewhere, join the data at the reader.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics import export
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry
from prometheus_client.process_collector import ProcessCollector

from paceline import __version__
from paceline.telemetry.definitions import METRICS, HistogramMetric, Kind, Labels, Metric
from paceline.telemetry.figures import Figures, Histogram

MAX_POOLS = 500
"""Pools with series of their own. The counts of any more are added up under :data:`OTHER`."""
OTHER = "(other)"
MAX_SERIES = 50_000
"""OpenTelemetry's own bound, for each metric. Above what the labels allow, so that it never bites."""

_SCOPE = InstrumentationScope("paceline", __version__)


class Metrics:
    """The metrics of one process. Collect ``registry`` after :meth:`update`, from one thread at a time."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=False)
        self._figures = Figures()
        self._pools: set[str] = set()
        self._started_ns = time.time_ns()
        ProcessCollector(registry=self.registry)
        reader = _Reader(self.registry, self._histograms)
        resource = Resource({"service.name": "paceline", "service.version": __version__})
        self._provider = sdk.MeterProvider(metric_readers=[reader], resource=resource, shutdown_on_exit=False)
        meter = self._provider.get_meter(_SCOPE.name, _SCOPE.version)
        for metric in METRICS:
            if isinstance(metric, HistogramMetric):
                continue
            create = meter.create_observable_counter if metric.kind is Kind.COUNTER else meter.create_observable_gauge
            create(metric.name, [self._callback(metric)], unit=metric.unit, description=metric.description)

    def update(self, figures: Figures) -> None:
        """What the next collection shows."""
        self._figures = figures

    def close(self) -> None:
        """Take the metrics out of the registry."""
        self._provider.shutdown()

    def _callback(self, metric: Metric) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            rows: dict[Labels, float] = {}
            for labels, value in metric.read(self._figures):
                bounded = self._bounded(metric.labels, labels)
                if bounded is labels:
                    rows[labels] = value
                elif metric.kind is Kind.COUNTER:
                    rows[bounded] = rows.get(bounded, 0) + value
            return [Observation(value, dict(zip(metric.labels, labels, strict=True))) for labels, value in rows.items()]

        return observe

    def _bounded(self, names: Labels, labels: Labels) -> Labels:
        """The labels, with a pool above the bound replaced. Those that came first keep their own."""
        if not names or names[0] != "pool" or labels[0] in self._pools:
            return labels
        if len(self._pools) < MAX_POOLS:
            self._pools.add(labels[0])
            return labels
        return (OTHER, *labels[1:])

    def _histograms(self) -> list[export.Metric]:
        now_ns = time.time_ns()
        found: list[export.Metric] = []
        for metric in METRICS:
            if isinstance(metric, HistogramMetric):
                rows: dict[Labels, Histogram] = {}
                for labels, histogram in metric.read(self._figures):
                    bounded = self._bounded(metric.labels, labels)
                    rows[bounded] = _added(rows[bounded], histogram) if bounded in rows else histogram
                points = [
                    _point(dict(zip(metric.labels, labels, strict=True)), histogram, self._started_ns, now_ns)
                    for labels, histogram in rows.items()
                ]
                if points:
                    data = export.Histogram(points, export.AggregationTemporality.CUMULATIVE)
                    found.append(export.Metric(metric.name, metric.description, metric.unit, data))
        return found


class _Reader(PrometheusMetricReader):
    """Hands what the SDK collects, and the histograms, to Prometheus."""

    def __init__(self, registry: CollectorRegistry, histograms: Callable[[], list[export.Metric]]) -> None:
        kinds = (sdk.ObservableCounter, sdk.ObservableGauge)
        super().__init__(
            scope_info_enabled=False, registry=registry, cardinality_limits=dict.fromkeys(kinds, MAX_SERIES)
        )
        self._histograms = histograms

    def _receive_metrics(self, metrics_data: export.MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        for each in metrics_data.resource_metrics:
            metrics = export.ScopeMetrics(_SCOPE, self._histograms(), "")
            data = export.ResourceMetrics(each.resource, [*each.scope_metrics, metrics], each.schema_url)
            super()._receive_metrics(export.MetricsData([data]), timeout_millis, **kwargs)


def _added(left: Histogram, right: Histogram) -> Histogram:
    cells = [a + b for a, b in zip(left.cells, right.cells, strict=True)]
    return Histogram(left.bounds, cells, left.sum + right.sum)


def _point(attributes: dict[str, str], histogram: Histogram, since_ns: int, now_ns: int) -> export.HistogramDataPoint:
    return export.HistogramDataPoint(
        attributes=attributes,
        start_time_unix_nano=since_ns,
        time_unix_nano=now_ns,
        count=sum(histogram.cells),
        sum=histogram.sum,
        bucket_counts=histogram.cells,
        explicit_bounds=histogram.bounds,
        # Neither is known of cells, nor exported.
        min=0,
        max=0,
    )
