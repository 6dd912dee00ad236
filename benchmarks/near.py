"""What do near gains change? The streaming stage of the demo by each way, from the same frames with the same seeds.

    python benchmarks/near.py --prompts 50 --frames 104 --jobs 2
    python benchmarks/near.py --ways reuse                           # these, and what they are compared with

It goes on from the same first chunk. Every way is compared with the plain one of as many steps; "another seed" says how
far apart two plain videos are. The judge of docs/demo.md looks at the last 16 frames, the rest is what `streamt2v
evaluate` measures. Writes benchmarks/results/DATE-near-FRAMES.json after each prompt; run again, it goes on.
"""

import datetime
import json
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import score
import torch

from streamt2v.chunks import seams, streaming_plan
from streamt2v.config import merge, preset
from streamt2v.diffusion.noise import SeededDraws
from streamt2v.families.streamingt2v import from_text
from streamt2v.media.frames import Frames, to_u8
from streamt2v.stages.denoise import Sampling
from streamt2v.stages.stream import Streamer, StreamState, chunk_noise, continued
from streamt2v.training.sheets import OVERLAP
from streamt2v.training.world.captions import canonical
from streamt2v.training.world.clips import CLIP_FRAMES, LATENT_SIZE

ANOTHER_SEED = "another seed"
WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    ANOTHER_SEED: {},
    "reuse_interval 2": {"reuse_interval": 2},
    "guidance_stop 0.4": {"guidance_stop": 0.4},
    "both": {"reuse_interval": 2, "guidance_stop": 0.4},
    "replacement, nothing carried": {"replacement_carry": 0.0},
    "no replacement": {"replacement": False},
}


def psnr(frames: Frames, plain: Frames) -> float:
    """Mean over frames in dB."""
    error = np.square(frames.astype(float) - plain).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / np.maximum(error, 1e-9))).mean())


@torch.inference_mode()
def compare(index: int, seed: int, frames: int, wanted: list[str]) -> dict[str, Any]:
    """Make and measure the videos of one random prompt, by the ways with `wanted` in their names."""
    torch.set_num_threads(1)
    models, text = score.load(score.WEIGHTS)
    asked, demo = score.scene(index, seed).labels().tolist()[0], merge(preset("demo"))
    prompt, plan = canonical(asked), streaming_plan(frames, CLIP_FRAMES, OVERLAP)
    context = text.encode([demo.negative_prompt, prompt])
    noise, other = (
        chunk_noise(SeededDraws(seed + index + shift), CLIP_FRAMES, (4, *LATENT_SIZE)) for shift in (0, 500)
    )
    first = from_text(models, context, Sampling.of(demo.initialize), noise, CLIP_FRAMES)
    row: dict[str, Any] = {"index": index, "prompt": prompt}
    for steps in (8, 5):
        plain: Frames | None = None
        for name, change in chosen(WAYS, wanted).items():
            sampling = replace(Sampling.of(demo.stream), num_inference_steps=steps, **change)
            drawn = other if name == ANOTHER_SEED else noise
            streamer = Streamer(models, context, first[0], sampling, drawn)
            began, state = time.process_time(), StreamState.after_first_chunk(first, OVERLAP)
            new = torch.cat([made for made, _ in continued(streamer.new_frames, state, plan[1:])])
            seconds = (time.process_time() - began) / (len(plan) - 1)
            shown = to_u8(torch.cat([first, new]))
            plain = shown if plain is None else plain
            row[f"{steps} steps, {name}"] = {
                "seconds_per_chunk": seconds,
                "right": float(np.equal(score.judged(shown[-CLIP_FRAMES:]), asked).mean()),
                "psnr": None if name == "plain" else psnr(shown[CLIP_FRAMES:], plain[CLIP_FRAMES:]),
                **score.measured(shown, seams(plan)),
            }  # fmt: skip
    return row


def chosen(ways: dict[str, dict[str, Any]], wanted: list[str]) -> dict[str, dict[str, Any]]:
    """Those whose names contain one of some words, and what they are compared with."""
    always = ("plain", ANOTHER_SEED)
    return {name: way for name, way in ways.items() if name in always or any(word in name for word in wanted)}


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Means over prompts, by way."""
    found: dict[str, dict[str, float]] = {}
    for way in (key for key in rows[0] if " steps, " in key):
        known = {name: [row[way][name] for row in rows if row[way][name] is not None] for name in rows[0][way]}
        found[way] = {name: float(np.mean(values)) for name, values in known.items() if values}
    return found


def main() -> None:
    """Compare, store after every prompt, add the summary and print it."""
    parser = score.options(__doc__, prompts=50, frames=104, seed=8000)
    parser.add_argument("--ways", nargs="+", default=[""], metavar="WORD", help="those with such a word in their names")
    asked = parser.parse_args()
    path = asked.out or score.HERE / "results" / f"{datetime.date.today()}-near-{asked.frames}.json"
    header = {**score.machine(asked.frames, score.WEIGHTS), "ways": asked.ways}  # others begin a new file
    work = partial(compare, seed=asked.seed, frames=asked.frames, wanted=asked.ways)
    rows = score.collect(path, header, work, asked.prompts, asked.jobs)
    path.write_text(json.dumps({**header, "summary": summary(rows), "rows": rows}, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
