"""How a video was made, as one HTML page: what it shows, the command, settings, prompts and chunks."""

import shlex

from streamt2v.chunks import Chunk, evenly
from streamt2v.jobs import run_directory, shown
from streamt2v.jobs.recipe import Look, recorded_run, recorded_timeline
from streamt2v.media import pages, preview
from streamt2v.timeline import Prompt, plans

BODY = """
<p class="soft">{{ facts }}</p>
{{ moving(animation) }}
{% if stills %}<h2>Frames</h2>
{{ sheet(stills) }}
{% endif %}
{{ prompts(turns, fps) }}
{% if unfinished %}
{{ command(resume, "Continue it") }}
{% endif %}
{{ command(line) }}
{{ settings(groups, "Settings that differ from the preset" if line else "Recipe") }}
{% if not groups and not line %}<p class="soft">There is no recipe: streamt2v did not make this video.</p>
{% endif %}
{% if origin %}{{ settings({"": origin}, "Made with") }}
{% endif %}
{% for stage, plan, seconds in stages if plan %}
<details><summary>Chunks of the {{ stage }} stage ({{ plan|length }})</summary>
<table><tr><th>chunk</th><th>frames</th><th>new</th>{% if seconds %}<th>seconds</th>{% endif %}</tr>
{% for chunk in plan %}
<tr><td>{{ chunk.index }}</td><td>{{ chunk.start }} to {{ chunk.stop - 1 }}</td><td>{{ chunk.num_new }}</td>
{% if seconds %}<td>{{ "%.1f" % seconds[chunk.index] if chunk.index in seconds else "-" }}</td>{% endif %}</tr>
{% endfor %}
</table></details>
{% endfor %}
"""
_ORIGIN = ("streamt2v", "command", "config.model", "config.seed", "device", "card", "threads")


def as_html(seen: Look) -> str:
    """Return the page of a video, or of an unfinished run."""
    facts, fps, recipe = "nothing can be seen yet", 1.0, seen.recipe
    stills: list[pages.Still] = []
    animation = ""
    if (found := seen.found) is not None:
        fps = float(found.fps)
        facts = f"{found.frames} frames of {found.width}x{found.height} at {fps:g} fps, {found.frames / fps:.1f} s"
        numbers = evenly(found.frames, pages.MOVING_FRAMES)
        images = preview.thumbnails(seen.video, pages.MOVING_FRAMES, pages.MOVING_WIDTH)
        animation = pages.moving(images, min(fps, 25) if found.frames <= len(images) else 8)
        chosen = evenly(len(images), preview.SHEET_FRAMES)
        stills = pages.sheet(images[list(chosen)], [numbers[at] for at in chosen], fps)
    known = recorded_run(recipe)
    line = shown.command(recipe)
    if known is not None and found is not None and not seen.unfinished and known[0].num_frames != found.frames:
        known = None  # cut since, or a false claim: its chunks are not known
    turns: tuple[Prompt, ...] = ()
    stages: list[tuple[str, tuple[Chunk, ...], dict[int, float]]] = []
    if known is not None:
        run, command, kept = known
        turns = recorded_timeline(recipe, run.num_frames)
        stream, refine = plans(run, command, kept)
        # Of the streaming stage, if its run directory still exists.
        seconds = run_directory.chunk_seconds(run_directory.directory_for(seen.output))
        stages = [("streaming", stream, seconds), ("refinement", refine, {})]
    flat = {**recipe, **{f"config.{key}": value for key, value in (recipe.get("config") or {}).items()}}
    origin = {key.removeprefix("config."): flat[key] for key in _ORIGIN if key in flat} if line else {}
    return pages.render(
        f"{seen.output.name}{', unfinished' if seen.unfinished else ''}",
        BODY,
        facts=facts,
        fps=fps,
        animation=animation,
        stills=stills,
        turns=turns,
        unfinished=seen.unfinished,
        resume=shlex.join(["streamt2v", "resume", seen.output.name]),
        line=line,
        groups=shown.settings(recipe),
        origin=origin,
        stages=stages,
    )
