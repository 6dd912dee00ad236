"""How a video was made, as one HTML page: recipe, prompts, chunks and a contact sheet."""

from dataclasses import dataclass

from streamt2v import chunks, config
from streamt2v.jobs import run_directory
from streamt2v.jobs.recipe import Look, recorded_run, recorded_timeline
from streamt2v.media import pages, preview
from streamt2v.media.frames import contact_sheet
from streamt2v.timeline import Prompt

_BODY = """
<p>{{ facts }}</p>
{% if sheet %}<img alt="frames, evenly spaced" src="{{ sheet }}">
{% endif %}
{% if prompts %}<h2>Prompts</h2>
<table><tr><th>from frame</th><th>asked for at</th><th>prompt</th></tr>
{% for prompt in prompts %}
<tr><td>{{ prompt.frame }}</td><td>{{ prompt.asked }}</td><td class="text">{{ prompt.text }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for stage, rows in stages.items() if rows %}
<h2>Chunks, {{ stage }}</h2>
{% set timed = rows|map(attribute="seconds")|reject("none")|list %}
<table><tr><th>chunk</th><th>frames</th><th>new</th>{% if timed %}<th>seconds</th>{% endif %}</tr>
{% for row in rows %}
<tr><td>{{ row.chunk }}</td><td>{{ row.start }} to {{ row.stop - 1 }}</td><td>{{ row.new }}</td>
{% if timed %}<td>{{ "-" if row.seconds is none else "%.1f" % row.seconds }}</td>{% endif %}</tr>
{% endfor %}
</table>
{% endfor %}
<h2>Recipe</h2>
<table>
{% for key, value in recipe.items() %}<tr><td>{{ key }}</td><td class="text">{{ value }}</td></tr>
{% else %}<tr><td>none: not made by streamt2v</td></tr>
{% endfor %}
</table>
"""


@dataclass(frozen=True)
class _Row:
    chunk: int
    start: int
    stop: int
    new: int
    seconds: float | None


def as_html(seen: Look) -> str:
    """Return the page of a video, or of an unfinished run."""
    facts, sheet, recipe = "nothing can be seen yet", "", seen.recipe
    if (found := seen.found) is not None:
        facts = f"{found.frames} frames of {found.width}x{found.height} at {float(found.fps):g} fps"
        sheet = pages.picture(contact_sheet(preview.thumbnails(seen.video)))
    known = recorded_run(recipe)
    if known is not None and found is not None and not seen.unfinished and known[0].num_frames != found.frames:
        known = None  # cut since, or a false claim: its chunks are not known
    stages: dict[str, list[_Row]] = {}
    prompts: tuple[Prompt, ...] = ()
    if known is not None:
        prompts = recorded_timeline(recipe, known[0].num_frames)
        stages = _stages(*known, run_directory.chunk_seconds(run_directory.directory_for(seen.output)))
    title = f"{seen.output.name}{', unfinished' if seen.unfinished else ''}"
    return pages.render(
        title, _BODY, facts=facts, sheet=sheet, prompts=prompts, stages=stages, recipe=config.flatten(recipe)
    )


def _stages(run: config.RunConfig, command: str, kept: int, seconds: dict[int, float]) -> dict[str, list[_Row]]:
    """Return the chunks of both stages, with the seconds per chunk of the first if the run directory still exists."""
    begin = max(0, kept - run.stream.chunk)
    made = run.num_frames - begin
    streaming = chunks.streaming_plan(made, run.stream.chunk, run.stream.overlap) if command != "refine" else ()
    refinement = chunks.refinement_plan(made, run.refine.chunk, run.refine.overlap) if run.refine.enabled else ()
    return {
        stage: [
            _Row(chunk.index, begin + chunk.start, begin + chunk.stop, chunk.num_new, taken.get(chunk.index))
            for chunk in plan
        ]
        for stage, plan, taken in (("streaming", streaming, seconds), ("refinement", refinement, dict[int, float]()))
    }
