"""The commands that inspect videos and this machine: verify, info, evaluate, preview, report, doctor."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from streamt2v import config, files
from streamt2v.cli import options
from streamt2v.cli.options import argument, option
from streamt2v.cli.progress import Progress
from streamt2v.cli.terminal import complain, emit, plain, terminable
from streamt2v.errors import ConfigError, VideoError, WeightsError
from streamt2v.jobs import again, prepare, run_directory
from streamt2v.jobs.recipe import describe_video, inspect_source, look


def verify(
    videos: Annotated[list[Path], argument("Videos made by streamt2v.")], json_output: options.Json = False
) -> None:
    """Check that videos are intact: every bit as written, every frame decodable, as many as the recipe says.

    Exit code 3 at the first that is truncated, damaged or changed. There is no signature: a forger can pass this check.

    [b]streamt2v verify ball.mp4[/b]
    """
    for video in videos:
        facts = again.verify(video)
        emit(json.dumps(facts) if json_output else f"{video}: intact, {facts['frames']} frames, {facts['seconds']:g} s")


def info(
    video: Annotated[Path, argument("A video made by streamt2v, or an unfinished run.")],
    everything: Annotated[bool, option("--all", "Show every setting, not ten lines.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what a video is and what made it, read from the file itself.

    [b]streamt2v info ball.mp4[/b]

    [b]streamt2v info ball.mp4 --all[/b]
    """
    facts = describe_video(video)
    if json_output:
        emit(json.dumps(facts))
        return
    if everything:
        for key, value in config.flatten(facts).items():
            emit(plain(f"{key} = {value}"))
        return
    for key, said in _in_short(facts):
        emit(f"{key:<9} {plain(said)}")


def _in_short(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what most people want to know of a video, in at most ten lines."""
    video, recipe, rows = facts["video"], facts["recipe"], list[tuple[str, str]]()
    if "unfinished" in facts:
        rows.append(("growing", facts["unfinished"] if video else "nothing can be watched yet"))
    if video:
        seconds = video["frames"] / video["fps"]
        size = f"{video['width']}x{video['height']}"
        rows.append(("video", f"{size}, {video['frames']} frames at {video['fps']:g} fps, {seconds:.4g} s"))
    if not isinstance(recipe, dict):
        return [*rows, ("made by", recipe.removeprefix("none: "))]
    asked = recipe["config"] if isinstance(recipe.get("config"), dict) else {}
    later = sum(str(key).startswith("prompts.") for key in asked)
    merged = [f"LoRA {value}" for key, value in asked.items() if str(key).startswith("loras.")]
    command, threads, refined = recipe.get("command"), recipe.get("threads"), bool(asked.get("refine.enabled"))
    steps = [f"{asked.get('stream.num_inference_steps')} in the stream"] * (command != "refine")
    steps += [f"{asked.get('refine.num_inference_steps')} in the refiner"] * refined
    by = [f"{command if steps else 'interpolate'}, model {config.maker(str(command), asked)}", *merged]
    source = recipe.get("source") if isinstance(recipe.get("source"), dict) else {}
    version = recipe.get("streamt2v") or recipe.get("version")  # the second while it grows
    rows += [
        ("prompt", str(asked.get("prompt")) + f" (and {later} later ones)" * bool(later)),
        ("avoids", str(asked.get("negative_prompt") or "")),
        ("made by", ", ".join([*by, f"streamt2v {version}"])),
        ("from", str((source or {}).get("name") or asked.get("image") or "")),
        ("seed", str(asked.get("seed"))),
        ("steps", ", ".join(steps)),
        ("on", f"{recipe.get('card') or recipe.get('device')}, {threads} thread{'s' * (threads != 1)}"),
    ]
    return [(key, said[:500]) for key, said in rows if said] + [("more", "--all shows every setting")]


def measuring(
    prompt: Annotated[str | None, option("--prompt", "What they show, for CLIP. Default: each video's prompt.")] = None,
    against: Annotated[Path | None, option("--against", "Compare every frame with this video: PSNR and SSIM.")] = None,
    seams: Annotated[
        str | None, option("--seams", "Frames where chunks begin: 16,24,32 or 16:1200:8. Default: read from the video.")
    ] = None,
    window: Annotated[int, option("--window", "Number of frames that count as the first, and as the last.")] = 100,
    flow_size: Annotated[
        int, option("--flow-size", "Side of the square that frames are scaled to for the flow; smaller is faster.")
    ] = 720,
    clip: Annotated[
        str, option("--clip", "auto (the published CLIP if fetched, else demo's), demo, hub:OWNER/NAME or none.")
    ] = "auto",
    clip_every: Annotated[int, option("--clip-every", "Apply CLIP to every Nth frame.")] = 8,
    device: Annotated[str, option("--device", "Where CLIP runs: auto, cpu, cuda, cuda:1, mps.")] = "auto",
) -> None:
    """What `evaluate` measures and how: the fields of `evaluation.Settings`."""


@options.knows(measuring)
def evaluate(
    videos: Annotated[list[Path], argument("The videos to measure, from any source.")],
    report_file: Annotated[Path | None, option("--report", "Write a page with plots and a contact sheet.")] = None,
    csv_file: Annotated[Path | None, option("--csv", "Write the scores, one row per video.")] = None,
    frames_csv: Annotated[Path | None, option("--frames-csv", "Write the measurements, one row per frame.")] = None,
    overwrite: Annotated[bool, option("--overwrite", "-f", "Replace files that exist.")] = False,
    json_output: options.Json = False,
    quiet: options.Quiet = False,
    **given: Any,
) -> None:
    """Measure videos: scene cuts, motion and warp error (MAWE), CLIP, drift, seams, stagnation, flicker.

    Memory does not grow with the length. docs/metrics.md defines every score.

    [b]streamt2v evaluate ball.mp4 --report ball.html[/b]

    [b]streamt2v evaluate videos/*.mp4 --json[/b]

    [b]streamt2v evaluate ball_fast.mp4 --against ball.mp4[/b]
    """
    for video in videos:
        if not video.exists():
            raise VideoError(f"{video} does not exist")
    progress, against = Progress(quiet=quiet), given["against"]
    targets = [target for target in (report_file, csv_file, frames_csv) if target is not None]
    for number, target in enumerate(targets):
        prepare.check_target(target, overwrite, *videos, against, *targets[:number])
    try:
        with progress:
            for video in filter(None, [against, *(videos if len(videos) == 1 else [])]):
                progress.doing(f"reading {video.name}")
                inspect_source(video)
            progress.doing("loading what measures")
            from streamt2v.metrics import evaluation, report
    except ImportError as error:
        hint = 'install what it needs with `pip install ".[metrics]"`, or `uv tool install ".[metrics]"`, in a checkout'
        raise ConfigError(f"evaluate cannot start: {error}", hint) from error
    if given["seams"] is not None:
        given["seams"] = evaluation.parse_seams(given["seams"])
    settings = evaluation.Settings(**given)
    with terminable("stopped; nothing was written"), progress:
        progress.doing(f"reading {len(videos)} video{'s' * (len(videos) > 1)}")
        results, failures = evaluation.evaluate(videos, settings, progress, progress.say)
    for failure in failures[not results :]:
        complain(f"error: {failure.message}", failure.hint)
    if not results:
        raise failures[0]
    pages: list[tuple[Path | None, Callable[[], str]]] = [
        (report_file, lambda: report.as_html(results, settings)),
        (csv_file, lambda: report.videos_csv(results)),
        (frames_csv, lambda: report.frames_csv(results)),
    ]
    for path, page in pages:
        if path is not None:
            files.write_bytes(path, page().encode(errors="replace"))
    facts = report.as_json(results, settings)
    emit(json.dumps(facts, ensure_ascii=False, allow_nan=False) if json_output else plain(report.as_text(results)))
    if failures:
        raise VideoError(f"{len(failures)} of {len(videos)} videos could not be measured", "the others are above")


def preview(
    source: Annotated[Path, argument("Any video, or an unfinished run.", metavar="VIDEO")],
    output: Annotated[
        list[Path] | None,
        option("--output", "-o", "A .png is a contact sheet, .webp and .gif move. Default: a .png and a .webp."),
    ] = None,
    width: Annotated[int, option("--width", "Maximum width of a frame.", min=16, max=4096)] = 320,
    overwrite: Annotated[bool, option("--overwrite", "-f", "Replace files that exist.")] = False,
) -> None:
    """Make small pictures of a video: a contact sheet of 24 frames and a moving preview of 96.

    [b]streamt2v preview ball.mp4[/b]

    [b]streamt2v preview ball.mp4 -o ball.gif --width 160[/b]
    """
    named = run_directory.output_of(source)
    targets = output or [named.parent / f"{named.stem}_preview{kind}" for kind in (".png", ".webp")]
    for number, target in enumerate(targets):
        prepare.check_target(target, overwrite, named, *targets[:number])
    with Progress() as progress:
        progress.doing(f"reading {source.name}")
        seen = look(source)
        if seen.found is None:
            raise VideoError(f"nothing of {named} can be watched yet", "wait for its first chunk, or resume it")
        from streamt2v.media import preview

        for target in targets:
            preview.check(target)
        for target in targets:
            progress.doing(f"writing {target.name}")
            preview.write(seen.video, target, width)
            emit(str(target))


def report(
    video: Annotated[Path, argument("A video, or an unfinished run.")],
    output: Annotated[Path | None, option("--output", "-o", "The HTML file. Default: the video's name.")] = None,
    overwrite: Annotated[bool, option("--overwrite", "-f", "Replace a file that exists.")] = False,
) -> None:
    """Write an HTML page on how a video was made: recipe, prompts, chunks, contact sheet.

    [b]streamt2v report ball.mp4[/b]

    [b]streamt2v report ball.mp4 -o made.html[/b]
    """
    named = run_directory.output_of(video)
    target = output or named.parent / f"{named.stem}.html"
    prepare.check_target(target, overwrite, named)
    with Progress() as progress:
        progress.doing(f"reading {video.name}")
        seen = look(video)
        from streamt2v.cli import report

        files.write_bytes(target, report.as_html(seen).encode(errors="replace"))
    emit(str(target))


def doctor(json_output: options.Json = False) -> None:
    """Check this machine: device, memory, ffmpeg, weights; what works, and what to do about the rest.

    Exit code 4 if something is missing.

    [b]streamt2v doctor[/b]
    """
    from streamt2v.cli.doctor import checks

    with Progress() as progress:
        progress.doing("checking this machine")
        results = checks()
    if json_output:
        emit(json.dumps([dataclasses.asdict(result) for result in results]))
    else:
        for result in results:
            emit(f"{'ok ' if result.ok else 'BAD'} {result.name}: {result.found}")
            if not result.ok:
                emit(f"    -> {result.advice}")
    if not all(result.ok for result in results):
        raise typer.Exit(WeightsError.exit_code)
