"""A judge of generated clips: a small classifier of the world's attributes, trained on rendered clips only."""

from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from streamt2v import files
from streamt2v.training import bundle
from streamt2v.training.engine import Job
from streamt2v.training.parts import Workshop
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import ATTRIBUTES, sample_scenes

FRAMES = 16
SIZE = (36, 64)


class Judge(nn.Module):
    """Logits of every attribute for clips [B, 16, 3, H, W] in [-1, 1].

    The motion is read from the order of the frames, everything else from each frame.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64)
        layers: list[nn.Module] = []
        for narrow, wide in pairwise(widths):
            layers += [nn.Conv2d(narrow, wide, 5, stride=2, padding=2), nn.GroupNorm(4, wide), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(64, 64, 3, padding=1), nn.SiLU())
        self.place_code = nn.Linear(64 * 5 * 8, 64)
        self.order = nn.Sequential(
            nn.Conv1d(64, 64, 5, padding=2), nn.SiLU(), nn.Conv1d(64, 64, 5, padding=2), nn.SiLU()
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(64 if name == "motion" else 192, len(words)) for name, words in ATTRIBUTES.items()}
        )

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Return logits [B, number of values] by attribute."""
        batch, frames = clips.shape[:2]
        small = functional.interpolate(clips.flatten(0, 1), SIZE, mode="bilinear", antialias=True)
        maps = self.features(small)
        codes = self.place_code(maps.flatten(1)).unflatten(0, (batch, frames))
        pooled = torch.cat([maps.mean((2, 3)), maps.amax((2, 3)), codes.flatten(0, 1)], 1)
        picture = pooled.unflatten(0, (batch, frames)).mean(1)
        moving = self.order(codes.transpose(1, 2)).mean(2)
        return {name: head(moving if name == "motion" else picture) for name, head in self.heads.items()}


def example_clips(
    count: int, generator: torch.Generator, spoil: bool, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Rendered clips [B, 16, 3, 36, 64] and labels [B, 6]; `spoil` blurs and disturbs them as a generator might."""
    scenes = sample_scenes(count, generator).to(device)
    start = torch.where(torch.rand(count, generator=generator) < 0.5, 0, 1)
    start = (start * torch.randint(0, 200, (count,), generator=generator))[:, None]
    clips = render(scenes, start + torch.arange(FRAMES), *SIZE)  # on the device
    if spoil:
        if torch.rand((), generator=generator) < 0.5:
            halved = functional.avg_pool2d(clips.flatten(0, 1), 2)
            clips = functional.interpolate(halved, SIZE, mode="bilinear").view_as(clips)
        strength = 0.15 * float(torch.rand((), generator=generator))
        coarse = torch.randn(count, FRAMES, 3, 9, 16, generator=generator).flatten(0, 1).to(clips)
        clips = clips + strength * functional.interpolate(coarse, SIZE, mode="bilinear").view_as(clips)
    return clips.clamp(-1, 1), scenes.labels()


def judge_loss(judge: Judge, generator: torch.Generator, batch: int = 16) -> Tensor:
    """Cross-entropy of all attributes on fresh clips."""
    clips, labels = example_clips(batch, generator, spoil=True, device=next(judge.parameters()).device)
    logits = judge(clips)
    losses = [functional.cross_entropy(logits[name], labels[:, i]) for i, name in enumerate(ATTRIBUTES)]
    return torch.stack(losses).sum()


@torch.no_grad()
def verdict(judge: Judge, clips: Tensor) -> Tensor:
    """The most likely attribute indices [B, 6] of clips [B, 16, 3, H, W]."""
    judge.eval()
    return torch.stack([logits.argmax(1) for logits in judge(clips).values()], 1)


def score(judge: Judge, clips: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of clips in which each attribute is as asked; labels [B, 6], negative where nothing was asked."""
    guessed = verdict(judge, clips).cpu()
    result = {}
    for column, name in enumerate(ATTRIBUTES):
        asked = labels[:, column] >= 0
        result[name] = float((guessed == labels)[asked, column].float().mean()) if asked.any() else float("nan")
    return result


def held_out_accuracy(judge: Judge, count: int = 100, seed: int = 424242) -> dict[str, float]:
    """Score of the judge on rendered clips of a seed that training never uses."""
    generator = torch.Generator().manual_seed(seed)
    clips, labels = example_clips(count, generator, spoil=False)
    return score(judge, clips.to(next(judge.parameters()).device), labels)


def save_judge(judge: Judge, folder: Path) -> None:
    """Write folder/judge.safetensors (half precision)."""
    with files.replacing(folder / "judge.safetensors") as part:
        save_file({key: value.half().contiguous() for key, value in judge.state_dict().items()}, part)


def judge_job(shop: Workshop) -> Job:
    """The judge of generated clips, for `train.py`."""
    network, batch = shop.resumed("judge", Judge()), shop.many(16)
    return Job(
        lambda progress: judge_loss(network, shop.generator, batch),
        list(network.parameters()),
        lambda folder: save_judge(network, folder),
        lambda folder: f"held-out accuracy {held_out_accuracy(network)}",
        adam=list(network.heads.parameters()),
        samples=batch,
        device=shop.device,
    )


def load_judge(folder: Path) -> Judge:
    """Read folder/judge.safetensors."""
    return bundle.read(folder, "judge", Judge()).eval()
