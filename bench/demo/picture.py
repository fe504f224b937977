"""The result as a picture: one self-contained SVG, readable on light and on dark pages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from bench.demo.figures import Figures
from bench.demo.report import Results, faults, percent, seconds
from bench.demo.settings import Settings
from bench.fleet.plan import Mode

_WIDTH = 960
_MARGIN = 28
_GAP = 26
_CHART_TOP, _CHART_HEIGHT = 132, 118
_ROWS_TOP, _ROW = 292, 44
_SOURCE = "counted at a simulated upstream; make demo"
_TALLEST = 1.5
"""Of the chart, in limits."""

# A page may be dark while the picture is shown by a viewer that knows nothing of that: so it brings its own ground.
_STYLE = """
text { font-family: system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; font-size: 13px; fill: #1f2328 }
.ground { fill: #ffffff; stroke: #d0d7de }
.title { font-size: 19px; font-weight: 600 }
.mode { font-size: 15px; font-weight: 600 }
.quiet { fill: #59636e; font-size: 12px }
.value { font-size: 15px; font-weight: 600 }
.good { fill: #1a7f37 } .bad { fill: #cf222e }
.chat { fill: #0969da } .batch { fill: #b7c0ca } .track { fill: #eaeef2 } .bar { fill: #8c959f }
.bar.good { fill: #2da44e } .bar.bad { fill: #e5534b }
.limit { stroke: #1f2328; stroke-dasharray: 5 4; fill: none }
.wanted { stroke: #cf222e; stroke-width: 1.5; fill: none }
.axis { stroke: #d0d7de }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .ground { fill: #0d1117; stroke: #30363d } .quiet { fill: #9198a1 }
.good { fill: #3fb950 } .bad { fill: #ff7b72 }
.chat { fill: #388bfd } .batch { fill: #4d5661 } .track { fill: #21262d } .bar { fill: #6e7681 }
.bar.good { fill: #2ea043 } .bar.bad { fill: #da3633 }
.limit { stroke: #e6edf3 } .wanted { stroke: #ff7b72 } .axis { stroke: #30363d }
}
"""

_TITLES: dict[Mode, tuple[str, str]] = {
    "alone": ("SDK retries as shipped", "two retries, then the call fails"),
    "alone_patient": ("SDK retries until the deadline", "every caller for itself"),
    "paceline": ("With Paceline", "reserve, call, commit"),
}


class _Row(NamedTuple):
    label: str
    value: Callable[[Figures], float]
    text: Callable[[Figures], str]
    good: Callable[[Figures], bool]
    most: float | None
    """What fills the bar; ``None``: the largest of all modes."""


_ROWS = (
    _Row("chat calls lost", lambda f: f.lost_interactive, lambda f: percent(f.lost_interactive),
         lambda f: f.lost_interactive < 0.001, None),
    _Row("chat wait p99, answered calls", lambda f: f.wait_interactive_p99_s or 0.0,
         lambda f: seconds(f.wait_interactive_p99_s),
         lambda f: f.wait_interactive_p99_s is not None and f.wait_interactive_p99_s <= 2.0, None),
    _Row("refused (429) per 1,000 accepted", lambda f: f.refused_per_1000 or 0.0,
         lambda f: _amount(f.refused_per_1000),
         # Without any accepted call there is no ratio, and nothing to be pleased with.
         lambda f: f.refused_per_1000 is not None and f.refused_per_1000 <= 2.0, None),
    _Row("limit used", lambda f: f.limit_used, lambda f: percent(f.limit_used), lambda f: f.limit_used >= 0.95, 1.0),
)  # fmt: skip


def picture(settings: Settings, results: Results) -> str:
    """The SVG."""
    height = _ROWS_TOP + len(_ROWS) * _ROW + 46
    width = (_WIDTH - 2 * _MARGIN - _GAP * (len(results) - 1)) / len(results)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" width="{_WIDTH}" height="{height}" '
        f'role="img" aria-label="{escape(_summary(results), {chr(34): "&quot;"})}">',
        f"<style>{_STYLE}</style>",
        f'<rect class="ground" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1}" rx="10"/>',
        _text(_MARGIN, 42, "The same fleet on the same API limit", "title"),
        _text(_MARGIN, 65, _fleet(settings, results), "quiet"),
    ]
    for number, (mode, each) in enumerate(results.items()):
        left = _MARGIN + number * (width + _GAP)
        parts += _head(left, mode)
        parts += _chart(left, width, each)
        for position, row in enumerate(_ROWS):
            parts += _bar(left, _ROWS_TOP + position * _ROW, width, row, each, results)
    parts += _legend(height - 22, "not valid: see result.json" if faults(settings, results) else _SOURCE)
    parts.append("</svg>\n")
    return "\n".join(parts)


def _fleet(settings: Settings, results: Results) -> str:
    demand = next(iter(results.values())).demand_interactive
    return (
        f"{settings.chats} chat services that together want {demand:.0%} of the limit, in bursts, beside "
        f"{settings.jobs} batch jobs that always have work; one deadline of {settings.deadline_s:.0f} s for every call"
    )


def _summary(results: Results) -> str:
    return "; ".join(
        f"{_TITLES[mode][0]}: {percent(each.lost_interactive)} of chat calls lost, "
        f"{_amount(each.refused_per_1000)} refusals per 1,000 accepted, {percent(each.limit_used)} of the limit used"
        for mode, each in results.items()
    )


def _amount(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.1f}"


def _head(left: float, mode: Mode) -> list[str]:
    title, below = _TITLES[mode]
    return [_text(left, 98, title, "mode"), _text(left, 117, below, "quiet")]


def _chart(left: float, width: float, each: Figures) -> list[str]:
    rate = (each.budget[each.binding_dimension] - each.level_at_start[each.binding_dimension]) / each.window_s
    chat, batch = each.timeline["interactive"], each.timeline["batch"]
    wanted = each.timeline["interactive_wanted"]
    bottom = _CHART_TOP + _CHART_HEIGHT
    step = width / len(chat)

    def y(amount: float) -> float:
        return bottom - min(_TALLEST, amount / rate) * _CHART_HEIGHT / _TALLEST

    both = [one + other for one, other in zip(chat, batch, strict=True)]
    limit = y(rate)
    parts = [
        _area("batch", left, step, [y(amount) for amount in both], bottom),
        _area("chat", left, step, [y(amount) for amount in chat], bottom),
        f'<path class="wanted" d="{_steps(left, step, [y(amount) for amount in wanted])}"/>',
        f'<path class="limit" d="M{left:.1f} {limit:.1f}h{width:.1f}"/>',
        f'<path class="axis" d="M{left:.1f} {bottom}h{width:.1f}"/>',
        _text(left + width, bottom + 16, f"{each.window_s:.0f} s", "quiet", "end"),
        _text(left, bottom + 16, "tokens accepted per second", "quiet"),
    ]
    return parts


def _steps(left: float, step: float, heights: Sequence[float]) -> str:
    path = [f"M{left:.1f} {heights[0]:.1f}"]
    for number, height in enumerate(heights):
        path.append(f"V{height:.1f}H{left + (number + 1) * step:.1f}")
    return "".join(path)


def _area(kind: str, left: float, step: float, heights: Sequence[float], bottom: float) -> str:
    return f'<path class="{kind}" d="{_steps(left, step, heights)}V{bottom}H{left:.1f}Z"/>'


def _bar(left: float, top: float, width: float, row: _Row, each: Figures, results: Results) -> list[str]:
    most = row.most or max(row.value(other) for other in results.values()) or 1.0
    filled = min(1.0, row.value(each) / most) * width
    verdict = "good" if row.good(each) else "bad"
    return [
        _text(left, top + 14, row.label, "quiet"),
        _text(left + width, top + 15, row.text(each), f"value {verdict}", "end"),
        f'<rect class="track" x="{left:.1f}" y="{top + 21}" width="{width:.1f}" height="7" rx="3.5"/>',
        f'<rect class="bar {verdict}" x="{left:.1f}" y="{top + 21}" width="{filled:.1f}" height="7" rx="3.5"/>',
    ]


def _legend(y: float, source: str) -> list[str]:
    parts = []
    x = float(_MARGIN)
    for kind, text in (("chat", "chat, accepted"), ("batch", "batch, accepted")):
        parts.append(f'<rect class="{kind}" x="{x:.0f}" y="{y - 10:.0f}" width="14" height="11" rx="2"/>')
        parts.append(_text(x + 20, y, text, "quiet"))
        x += 128
    for kind, text in (("wanted", "what chat wants"), ("limit", "the limit")):
        parts.append(f'<path class="{kind}" d="M{x:.0f} {y - 4:.0f}h20"/>')
        parts.append(_text(x + 26, y, text, "quiet"))
        x += 140
    parts.append(_text(_WIDTH - _MARGIN, y, source, "quiet", "end"))
    return parts


def _text(x: float, y: float, text: str, kind: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
