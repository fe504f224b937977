"""The cost of a decision over the number of those that wait: one self-contained SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from xml.sax.saxutils import escape

from bench.fairness.judging import fit

_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 24, 56, 48
# A page may be dark while the picture is shown by a viewer that knows nothing of that: so it brings its own ground.
_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 11px; fill: #59636e }
.ground { fill: #ffffff; stroke: #d0d7de }
.title { font-size: 14px; font-weight: 600; fill: #1f2328 }
.axis { stroke: #d0d7de; fill: none }
.point { fill: #0969da } .fit { stroke: #8c959f; stroke-width: 2; fill: none }
@media (prefers-color-scheme: dark) {
text { fill: #9198a1 } .ground { fill: #0d1117; stroke: #30363d } .title { fill: #e6edf3 } .axis { stroke: #30363d }
.point { fill: #388bfd } .fit { stroke: #6e7681 }
}
"""


def picture(title: str, costs: Mapping[int, Sequence[float]]) -> str:
    """The SVG: a point for each run, and the line of a + b·log₁₀(waiters) through their medians."""
    points = [(math.log10(waiters), us) for waiters, each in costs.items() for us in each if not math.isnan(us)]
    middle = {waiters: [us for us in each if not math.isnan(us)] for waiters, each in costs.items()}
    base, slope = fit([(math.log10(waiters), median(each)) for waiters, each in middle.items() if each])
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    top = 1.15 * max(us for _, us in points)

    def across(x: float) -> float:
        return _LEFT + (x - least) / max(1e-9, most - least) * (_WIDTH - _LEFT - _RIGHT)

    def y(us: float) -> float:
        return _HEIGHT - _BOTTOM - us / top * (_HEIGHT - _BOTTOM - _TOP)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" rx="8"/>',
        f'<text class="title" x="16" y="24">{escape(title)}</text>',
        f'<text x="{_WIDTH - 16}" y="42" text-anchor="end">'
        f"line: {base:.0f} µs {'+' if slope >= 0 else '−'} {abs(slope):.0f} µs × log₁₀(waiters)</text>",
        '<text x="16" y="42">µs</text>',
    ]
    step = _round_step(top)
    for line in range(int(top / step) + 1):
        at = y(line * step)
        parts.append(f'<path class="axis" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{line * step:g}</text>')
    for waiters in costs:
        at = across(math.log10(waiters))
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - 28}" text-anchor="middle">{waiters:,}</text>')
    parts.append(f'<text x="{_WIDTH / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">that wait</text>')
    parts.append(
        f'<path class="fit" d="M{across(least):.1f} {y(base + slope * least):.1f}'
        f'L{across(most):.1f} {y(base + slope * most):.1f}"/>'
    )
    parts += [f'<circle class="point" cx="{across(x):.1f}" cy="{y(us):.1f}" r="3.5"/>' for x, us in points]
    parts.append("</svg>\n")
    return "\n".join(parts)


def _round_step(top: float) -> float:
    """Between lines: 1, 2 or 5 times a power of ten, so that there are about five."""
    rough = top / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
