"""Reports of measurements for people and scripts: a table, CSV, JSON and a self-contained HTML page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from streamt2v import __version__
from streamt2v.media import pages
from streamt2v.media.frames import contact_sheet
from streamt2v.metrics.evaluation import SCORES, Measured, Settings
from streamt2v.metrics.motion import FLOW
from streamt2v.metrics.scores import Series, mean

MEAN = "mean"
_WIDTH, _HEIGHT, _MARGIN = 900, 130, 48  # of a plot, in pixels
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
_BODY = """
<p>{{ how }}</p>
<table><tr>{% for name in header %}<th title="{{ scores.get(name, "") }}">{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% for result, facts, sheet, plots in videos %}
<h2>{{ result.subject.video }}</h2>
<p>{{ facts }}</p>
<img alt="frames, evenly spaced" src="{{ sheet }}">
{% for title, drawn in plots %}<p>{{ title }}</p>
{{ drawn }}
{% endfor %}
{% endfor %}
<details><summary>What the scores mean</summary>
<dl>{% for name, text in scores.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl></details>
"""


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
    """Return a page with the table and, for each video, plots and a contact sheet, all embedded."""
    header, *rows = _rows(results)
    how = f"flow: {FLOW}, at {settings.flow_size}x{settings.flow_size}; first and last {settings.window} frames"
    if settings.against is not None:
        how += f"; compared with {settings.against}"
    videos = [
        (result, _facts(result), pages.picture(contact_sheet(np.stack(result.thumbnails))), _plots(result))
        for result in results
    ]
    values = {"how": how, "header": header, "rows": rows, "videos": videos, "scores": SCORES}
    return pages.render("streamt2v evaluate", _BODY, **values)


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
        (title, Markup(plot(result.series[name], seams, result.cuts)))  # made of numbers only
        for name, title in _PLOTS.items()
        if np.isfinite(result.series[name]).sum() > 1
    ]


def plot(series: Series, seams: Sequence[int] = (), cuts: Sequence[int] = ()) -> str:
    """Draw a series as SVG: grey lines where chunks begin, red ones at cuts; a long series is drawn by its extremes."""
    frames = np.flatnonzero(np.isfinite(series))
    low, high = float(series[frames].min()), float(series[frames].max())
    last, span = max(1, len(series) - 1), (high - low) or 1.0

    def x(frame: float) -> str:
        return f"{_MARGIN + frame / last * (_WIDTH - _MARGIN):.1f}"

    def y(value: float) -> str:
        return f"{(high - value) / span * (_HEIGHT - 20) + 4:.1f}"

    points = []
    for part in np.array_split(frames, min(len(frames), _MAX_POINTS)):
        extremes = {part[series[part].argmin()], part[series[part].argmax()]}
        points += [f"{x(frame)},{y(series[frame])}" for frame in sorted(extremes)]
    marks = [(seam, "#ccc") for seam in sorted(set(seams))] + [(cut, "#d33") for cut in cuts]
    lines = "".join(
        f'<line x1="{x(at)}" x2="{x(at)}" y1="4" y2="{_HEIGHT - 16}" stroke="{colour}"/>' for at, colour in marks
    )
    labels = "".join(
        f'<text x="{place[0]}" y="{place[1]}" text-anchor="{anchor}">{text}</text>'
        for place, anchor, text in (
            ((_MARGIN - 4, 12), "end", f"{high:.3g}"),
            ((_MARGIN - 4, _HEIGHT - 16), "end", f"{low:.3g}"),
            ((_MARGIN, _HEIGHT - 2), "start", "0"),
            ((_WIDTH, _HEIGHT - 2), "end", f"{len(series) - 1}"),
        )
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}">{lines}'
        f'<polyline fill="none" stroke="#26c" points="{" ".join(points)}"/>{labels}</svg>'
    )
