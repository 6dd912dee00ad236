"""Score demo weights: what the judge sees in generated clips, at the start and after streaming.

python benchmarks/score.py --count 40
python benchmarks/score.py --count 8 --chunks 10 --without apm --weights DIR
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import ConditionalAttention
from streamt2v.models.unet3d import UNet3D
from streamt2v.stages.stream import StreamModels
from streamt2v.training import bundle, denoisers, sheets
from streamt2v.training.captions import build_tokenizer, canonical
from streamt2v.training.clip import DIM, build_text, build_vision
from streamt2v.training.data import TextSource
from streamt2v.training.judge import load_judge, score
from streamt2v.training.vae import build_vae
from streamt2v.training.world import sample_scenes

HERE = Path(__file__).parent
WEIGHTS = HERE.parent / "streamt2v" / "demo"


@dataclass(frozen=True)
class Scores:
    """Share of clips in which each attribute is as asked, first and last 16 frames, and the change between frames."""

    first: dict[str, float]
    last: dict[str, float]
    seam_change: float
    inside_change: float


def prompts(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Random prompts of the world and their attribute indices [count, 5]."""
    labels = sample_scenes(count, torch.Generator().manual_seed(seed)).labels()
    return [canonical(row) for row in labels.tolist()], labels


def load(folder: Path, cam: bool = True, apm: bool = True) -> tuple[StreamModels, TextSource]:
    """Load the networks of the first two stages from a folder; False leaves a part out."""
    tokenizer = build_tokenizer()
    text = TextSource(tokenizer, bundle.freeze(bundle.read(folder, "text", build_text(len(tokenizer)))))
    tokens = bundle.read(folder, "apm", AppearanceTokens(DIM, 2 * DIM, denoisers.IMAGE_TOKENS, DIM))
    vision = bundle.freeze(bundle.read(folder, "vision", build_vision()))
    models = sheets.models(
        bundle.freeze(bundle.read(folder, "unet", UNet3D(denoisers.BASE))),
        bundle.freeze(bundle.read(folder, "vae", build_vae())),
        bundle.freeze(bundle.read(folder, "cam", ConditionalAttention(denoisers.CAM))) if cam else None,
        (bundle.freeze(tokens), vision) if apm else None,
    )
    return models, text


def evaluate(
    folder: Path, count: int = 20, chunks: int = 0, seed: int = 10, cam: bool = True, apm: bool = True
) -> tuple[Scores, Tensor]:
    """Generate `count` videos from random prompts and judge them.

    Args:
        folder: the weights files.
        count: number of videos.
        chunks: chunks of 8 frames streamed after the first 16 frames.
        seed: of prompts and noise.
        cam, apm: False switches that part off.

    Returns:
        Scores, and the videos [count, 16 + 8 chunks, 3, 72, 128] in [-1, 1].
    """
    models, text = load(folder, cam, apm)
    asked, labels = prompts(count, seed)
    judge = load_judge(HERE)
    videos = [sheets.make_video(models, text, prompt, chunks, seed + index) for index, prompt in enumerate(asked)]
    video = torch.stack(videos)
    seam, inside = sheets.seam_change(video) if chunks else (float("nan"), float(video.diff(dim=1).abs().mean()))
    return Scores(score(judge, video[:, :16], labels), score(judge, video[:, -16:], labels), seam, inside), video


def main() -> None:
    """Print the scores of a folder of weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--chunks", type=int, default=0)
    parser.add_argument("--seed", type=int, default=10)
    parser.add_argument("--without", choices=("cam", "apm"), action="append", default=[])
    parser.add_argument("--sheet", type=Path, help="write every fourth frame of the videos to this picture")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    scores, video = evaluate(
        asked.weights, asked.count, asked.chunks, asked.seed, "cam" not in asked.without, "apm" not in asked.without
    )
    print(scores)
    if asked.sheet:
        sheets.write_sheet(asked.sheet, video[:, ::4])


if __name__ == "__main__":
    main()
