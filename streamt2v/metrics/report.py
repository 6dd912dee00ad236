"""Reports of measurements for people and scripts: a table, CSV, JSON and a self-contained HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from streamt2v import __version__
from streamt2v.chunks import evenly
from streamt2v.media import pages
from streamt2v.metrics.evaluation import SCORES, Measured, Settings
from streamt2v.metrics.motion import FLOW
from streamt2v.metrics.scores import Series, mean

MEAN = "mean"
_WIDTH, _HEIGHT = 900, 130  # of a plot; it is stretched to the width of the page, its labels are not
_MAX_POINTS = 1500
_PLOTS: Mapping[str, str] = {
    "change": "change to the frame before, levels",
    "flow": "flow magnitude, pixels",
    "warp_error": "warp error, squared levels",
    "flicker": "flicker, levels",
    "colour_drift": "colour distance to the first frame, levels",
    "clip_image": "CLIP similarity to the first frame, x 100",
    "clip_text": "CLIP similarity to the prompt, x 100",
    "mse": "mean squared difference to the other video",
    "ssim": "SSIM with the other video",
}
LOW, HIGH, ONE = "\u2193", "\u2191", "\u2192 1"
BETTER: Mapping[str, str] = {
    **dict.fromkeys(("scene_cuts", "mawe_paper", "mawe_script", "warp_error", "flow_deviation"), LOW),
    **dict.fromkeys(("colour_drift", "flicker", "mse"), LOW),
    **dict.fromkeys(("clip_text", "clip_image", "psnr", "ssim"), HIGH),
    **dict.fromkeys(("stagnation", "seam_score", "seam_score_refine", "wrap"), ONE),
}
"""Which values of a score are better, as an arrow; the others only describe the motion."""
_BODY = """
<p class="soft">{{ how }}</p>
{% if rows|length > 1 %}
<table class="cards scores"><thead><tr><th class="text">video</th>
{% for name in names %}<th class="turned" title="{{ scores[name] }}">{{ name|replace("_", " ") }}
{{ better.get(name, "") }}</th>
{% endfor %}</tr></thead>
{% for row in rows %}
<tr><td class="text now">{{ row[0] }}</td>{% for cell in row[1:] %}
<td data-label="{{ names[loop.index0]|replace("_", " ") }} {{ better.get(names[loop.index0], "") }}"
{% if cell == best[loop.index0] and loop.index %} class="best"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
<p class="soft small">{{ legend }}</p>
{% for result, facts, stills, animation, values, plots in videos %}
<h2>{{ result.subject.video }}</h2>
<p class="soft">{{ facts }}</p>
{{ moving(animation) }}
{{ sheet(stills) }}
<h3>Scores</h3>
<table class="facts"><thead><tr><th class="text tight">score</th><th class="tight">value</th>
<th class="text">what it says</th></tr></thead>
{% for name, value in values.items() %}
<tr><td class="text tight">{{ name|replace("_", " ") }}</td>
<td class="tight">{{ value }} {{ better.get(name, "") }}</td>
<td class="text soft">{{ scores[name] }}</td></tr>
{% endfor %}
</table>
{% for title, drawn in plots %}<h3>{{ title }}</h3>
{{ drawn }}
{% endfor %}
{% endfor %}
<details><summary>What the scores mean</summary>
<dl>{% for name, text in scores.items() %}<dt>{{ name }} {{ better.get(name, "") }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl></details>
"""
_LEGEND = f"{LOW} lower is better, {HIGH} higher is better, {ONE}: the nearer to 1 the better; others only describe."


def means(results: Sequence[Measured]) -> dict[str, float | None]:
    """Return the mean of each score over the videos that have it."""
    columns = {name: [result.scores[name] for result in results] for name in SCORES}
    return {name: mean(np.array(values, np.float64)) for name, values in columns.items()}


def as_json(results: Sequence[Measured], settings: Settings) -> dict[str, Any]:
    """Return everything but series and pictures, ready for JSON."""
    how = {"flow": FLOW, "flow_size": settings.flow_size, "window": settings.window, "version": __version__}
    how["against"] = None if settings.against is None else str(settings.against)
    return {"videos": [result.summary() for result in results], MEAN: means(results), "settings": how}


def as_text(results: Sequence[Measured]) -> str:
    """Return one video as a list of scores with their meaning, several as a table with a row each and their means."""
    notes = [f"CLIP: {name}" for name in dict.fromkeys(result.clip for result in results)]
    rows = _rows(results)
    if len(results) == 1:
        header, row = rows
        width = max(map(len, header))
        pairs = zip(header[1:], row[1:], strict=True)
        lines = [f"{name:<{width}}  {value:>9}  {SCORES[name]}" for name, value in pairs]
        return "\n".join([row[0], *lines, *notes])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = [[f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(["  ".join(row) for row in padded] + notes)


def _rows(results: Sequence[Measured]) -> list[list[str]]:
    """Return a header, a row per video, and means if there are several; scores that no video has are left out."""
    table = [(result.subject.video, result.scores) for result in results]
    if len(results) > 1:
        table.append((MEAN, means(results)))
    shown = [name for name in SCORES if any(row[name] is not None for _, row in table)]
    return [["video", *shown], *([name, *(_number(row[key]) for key in shown)] for name, row in table)]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def videos_csv(results: Sequence[Measured]) -> str:
    """Return one row per video: what it is and its scores, empty where there is none."""
    facts = ("video", "frames", "width", "height", "fps", "prompt")
    rows = [[getattr(result.subject, fact) for fact in facts] + list(result.scores.values()) for result in results]
    return _csv([*facts, *SCORES], rows)


def frames_csv(results: Sequence[Measured]) -> str:
    """Return one row per frame of every video: its measurements, empty where there are none."""
    rows = [
        [result.subject.video, frame, *("" if np.isnan(value) else value for value in values)]
        for result in results
        for frame, values in enumerate(zip(*(series.tolist() for series in result.series.values()), strict=True))
    ]
    return _csv(["video", "frame", *results[0].series], rows)


def _csv(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()


def as_html(results: Sequence[Measured], settings: Settings) -> str:
    """Return a page with the table and, for each video, a preview, a contact sheet, scores and plots, all embedded."""
    (_, *names), *rows = _rows(results)
    how = f"flow: {FLOW}, at {settings.flow_size}x{settings.flow_size}; first and last {settings.window} frames"
    if settings.against is not None:
        how += f"; compared with {settings.against}"
    videos = [(result, _facts(result), *_pictures(result), _values(result), _plots(result)) for result in results]
    words: dict[str, Any] = {"how": how, "names": names, "rows": rows, "best": _best(results, names), "videos": videos}
    return pages.render("streamt2v evaluate", _BODY, **words, scores=SCORES, better=BETTER, legend=_LEGEND)


def _values(result: Measured) -> dict[str, str]:
    return {name: _number(value) for name, value in result.scores.items() if value is not None}


def _best(results: Sequence[Measured], names: Sequence[str]) -> list[str]:
    """Return the best value of each score as it is shown; empty where none is better, or all are alike."""
    found = list[str]()
    for name in names:
        values = [value for result in results if (value := result.scores[name]) is not None]
        rank = {LOW: values, HIGH: [-value for value in values], ONE: [abs(value - 1) for value in values]}
        order = rank.get(BETTER.get(name, ""), [])
        shown = {_number(value) for value in values}
        found.append(_number(values[order.index(min(order))]) if order and len(shown) > 1 else "")
    return found


def _pictures(result: Measured) -> tuple[list[pages.Still], str]:
    """Return the contact sheet of a video and its moving preview, of the same frames."""
    subject, shown = result.subject, result.thumbnails
    numbers = evenly(subject.frames, len(shown))
    return pages.sheet(shown, numbers, subject.fps), pages.moving(np.stack(shown), min(subject.fps, 6))


def _facts(result: Measured) -> str:
    subject = result.subject
    facts = f"{subject.frames} frames of {subject.width}x{subject.height} at {subject.fps:g} fps; CLIP: {result.clip}"
    if subject.prompt:
        facts += f"; prompt: {subject.prompt}"
    if result.cuts:
        facts += f"; cuts at {', '.join(map(str, result.cuts))}"
    return facts


def _plots(result: Measured) -> list[tuple[str, Markup]]:
    seams = result.subject.stream_seams + result.subject.refine_seams
    return [
        (title, Markup(plot(result.series[name], seams, result.cuts, result.subject.fps)))  # made of numbers only
        for name, title in _PLOTS.items()
        if np.isfinite(result.series[name]).sum() > 1
    ]


def plot(series: Series, seams: Sequence[int] = (), cuts: Sequence[int] = (), fps: float = 0) -> str:
    """Draw a series as HTML: grey lines where chunks begin, red ones at cuts; a long series by its extremes.

    The labels are text beside the drawing, which is stretched to the width of the page: they stay as large on a phone.
    """
    frames = np.flatnonzero(np.isfinite(series))
    low, high = float(series[frames].min()), float(series[frames].max())
    last, span = max(1, len(series) - 1), (high - low) or 1.0

    def x(frame: float) -> str:
        return f"{frame / last * _WIDTH:.1f}"

    def y(value: float) -> str:
        return f"{(high - value) / span * (_HEIGHT - 8) + 4:.1f}"

    points = []
    for part in np.array_split(frames, min(len(frames), _MAX_POINTS)):
        extremes = {part[series[part].argmin()], part[series[part].argmax()]}
        points += [f"{x(frame)},{y(series[frame])}" for frame in sorted(extremes)]
    marks = [(seam, "seam") for seam in sorted(set(seams))] + [(cut, "cut") for cut in cuts]
    lines = "".join(f'<line class="{kind}" x1="{x(at)}" x2="{x(at)}" y1="0" y2="{_HEIGHT}"/>' for at, kind in marks)
    ticks = "".join(
        f"<span>{frame}</span>" if not fps else f"<span>{frame} ({pages.timecode(frame, fps)})</span>"
        for frame in evenly(len(series), 3)
    )
    return (
        f'<div class="plot"><div class="high"><span>{high:.3g}</span><span>{low:.3g}</span></div>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" preserveAspectRatio="none">{lines}'
        f'<polyline class="curve" points="{" ".join(points)}"/></svg><div class="wide">{ticks}</div></div>'
    )
