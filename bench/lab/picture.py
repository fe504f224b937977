"""What the ledger believes and what is true, over the time of one run: one self-contained SVG."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from xml.sax.saxutils import escape

from bench.lab.run import Sample, steps

_WIDTH, _HEIGHT = 960, 178
_LEFT, _GAP, _TOP, _PANEL = 16, 22, 56, 86
_POINTS = 220
# A page may be dark while the picture is shown by a viewer that knows nothing of that: so it brings its own ground.
_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 11px; fill: #59636e }
.ground { fill: #ffffff; stroke: #d0d7de }
.title { font-size: 14px; font-weight: 600; fill: #1f2328 }
.axis { stroke: #d0d7de; fill: none }
.true { stroke: #8c959f; stroke-width: 2.5; fill: none } .ours { stroke: #0969da; stroke-width: 1.2; fill: none }
.event { stroke: #cf222e; stroke-dasharray: 3 3; fill: none }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1 } .ground { fill: #0d1117; stroke: #30363d } .title { fill: #e6edf3 } .axis { stroke: #30363d }
.true { stroke: #6e7681 } .ours { stroke: #388bfd } .event { stroke: #ff7b72 }
}
"""

Curve = tuple[str, Sequence[tuple[float, float]]]
"""Its class, and its points."""


def picture(title: str, samples: Sequence[Sample], window_s: float, events: Sequence[float]) -> str:
    """The SVG. ``events`` are instants to mark, seconds from the start of the window, as those of ``samples``."""
    shown = [one for one in samples if one.at <= window_s]
    thin = shown[:: max(1, -(-len(shown) // _POINTS))]
    each = max(5.0, window_s / 100)
    used = [
        (b.at, (b.charged - a.charged) / max(1, b.offered - a.offered - (b.outside_taken - a.outside_taken)))
        for a, b in steps(shown, each)
    ]
    panels: list[tuple[str, list[Curve]]] = [
        ("level", [_curve("true", thin, "true_level"), _curve("ours", thin, "level")]),
        ("limit a minute", [_curve("true", thin, "true_limit"), _curve("ours", thin, "limit")]),
        ("burst", [_curve("true", thin, "true_burst"), _curve("ours", thin, "burst")]),
        ("others a minute", [_curve("true", thin, "true_outside"), _curve("ours", thin, "outside")]),
        (f"part used, over {each:.0f} s", [("ours", used)]),
    ]
    width = (_WIDTH - 2 * _LEFT - _GAP * (len(panels) - 1)) / len(panels)
    start, end = thin[0].at, max(window_s, thin[-1].at)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="8"/>',
        f'<text class="title" x="{_LEFT}" y="24">{escape(title)}</text>',
        f'<text x="{_WIDTH - _LEFT}" y="24" text-anchor="end">grey: true; blue: as the ledger has it; '
        f"{start:.0f} s to {end:.0f} s</text>",
    ]
    for number, (name, curves) in enumerate(panels):
        left = _LEFT + number * (width + _GAP)

        def across(at: float, left: float = left) -> float:
            return left + (at - start) / max(1e-9, end - start) * width

        parts += _panel(name, curves, left, width, across)
        parts += [
            f'<path class="event" d="M{across(at):.1f} {_TOP}v{_PANEL}"/>' for at in (0.0, *events) if start < at < end
        ]
    parts.append("</svg>\n")
    return "\n".join(parts)


def _curve(kind: str, samples: Sequence[Sample], field: str) -> Curve:
    return kind, [(one.at, float(getattr(one, field))) for one in samples]


def _panel(
    name: str, curves: Sequence[Curve], left: float, width: float, across: Callable[[float], float]
) -> list[str]:
    # The warm-up may lie outside: it is cut off.
    values = [value for _, points in curves for at, value in points if at >= 0] or [0.0]
    least, most = min(0.0, *values), max(1e-3, *values)
    bottom = _TOP + _PANEL

    def y(value: float) -> float:
        return bottom - (min(most, max(least, value)) - least) / (most - least) * _PANEL

    parts = [
        f'<text x="{left:.0f}" y="{_TOP - 8}">{escape(name)}</text>',
        f'<text x="{left + width:.0f}" y="{_TOP - 8}" text-anchor="end">to {_short(most)}</text>',
        f'<path class="axis" d="M{left:.1f} {y(0.0):.1f}h{width:.1f}"/>',
    ]
    if least < 0:
        parts.append(f'<text x="{left:.0f}" y="{bottom + 16}">from {_short(least)}</text>')
    for kind, points in curves:
        path = "L".join(f"{across(at):.1f} {y(value):.1f}" for at, value in points)
        parts.append(f'<path class="{kind}" d="M{path}"/>')
    return parts


def _short(value: float) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value > 0.01 else "0"
