"""How a video was made, as one HTML page: recipe, prompts, chunks and a contact sheet."""

from streamt2v import config
from streamt2v.chunks import Chunk
from streamt2v.jobs import run_directory
from streamt2v.jobs.recipe import Look, recorded_run, recorded_timeline
from streamt2v.media import pages, preview
from streamt2v.media.frames import contact_sheet
from streamt2v.timeline import Prompt, plans

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
{% for stage, plan, seconds in stages if plan %}
<h2>Chunks, {{ stage }}</h2>
<table><tr><th>chunk</th><th>frames</th><th>new</th>{% if seconds %}<th>seconds</th>{% endif %}</tr>
{% for chunk in plan %}
<tr><td>{{ chunk.index }}</td><td>{{ chunk.start }} to {{ chunk.stop - 1 }}</td><td>{{ chunk.num_new }}</td>
{% if seconds %}<td>{{ "%.1f" % seconds[chunk.index] if chunk.index in seconds else "-" }}</td>{% endif %}</tr>
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


def as_html(seen: Look) -> str:
    """Return the page of a video, or of an unfinished run."""
    facts, sheet, recipe = "nothing can be seen yet", "", seen.recipe
    if (found := seen.found) is not None:
        facts = f"{found.frames} frames of {found.width}x{found.height} at {float(found.fps):g} fps"
        sheet = pages.picture(contact_sheet(preview.thumbnails(seen.video)))
    known = recorded_run(recipe)
    if known is not None and found is not None and not seen.unfinished and known[0].num_frames != found.frames:
        known = None  # cut since, or a false claim: its chunks are not known
    prompts: tuple[Prompt, ...] = ()
    stages: list[tuple[str, tuple[Chunk, ...], dict[int, float]]] = []
    if known is not None:
        run, command, kept = known
        prompts = recorded_timeline(recipe, run.num_frames)
        stream, refine = plans(run, command, kept)
        # Of the streaming stage, if its run directory still exists.
        seconds = run_directory.chunk_seconds(run_directory.directory_for(seen.output))
        stages = [("streaming", stream, seconds), ("refinement", refine, {})]
    title = f"{seen.output.name}{', unfinished' if seen.unfinished else ''}"
    values = {"facts": facts, "sheet": sheet, "prompts": prompts, "stages": stages, "recipe": config.flatten(recipe)}
    return pages.render(title, _BODY, **values)
