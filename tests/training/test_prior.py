"""Training of the prior: it learns to draw the embedding that a caption describes."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from streamt2v.models.prior import EmbeddingPrior, PriorConfig
from streamt2v.models.unet3d import TextContext
from streamt2v.training import engine, prior
from streamt2v.training.engine import Job
from streamt2v.training.world.captions import canonical, parse
from streamt2v.training.world.encoders import UNSEEN, attribute_codes
from streamt2v.training.world.scenes import ATTRIBUTES, sample_scenes


def summed(rows: Iterable[list[int]]) -> Tensor:
    """Return sums of the codes of labels, as both encoders learn them; -1 names none."""
    table = attribute_codes().split([len(words) for words in ATTRIBUTES.values()])
    ends = [torch.cat([codes, torch.zeros(1, codes.shape[1])]) for codes in table]
    return torch.stack([sum(codes[label] for codes, label in zip(ends, row, strict=True)) for row in rows])  # type: ignore[misc]


class Texts:
    """Stands for a text encoder that has learned its codes."""

    def encode(self, captions: list[str]) -> TextContext:
        return TextContext(torch.empty(0), summed([parse(caption) if caption else [-1] * 6 for caption in captions]))


def test_a_prior_learns_which_pictures_a_caption_means(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, generator, texts = (
        EmbeddingPrior(PriorConfig(width=64, depth=1)),
        torch.Generator().manual_seed(0),
        Texts(),
    )

    def loss(progress: float) -> Tensor:
        labels = sample_scenes(64, generator).labels()
        labels[:, UNSEEN] = -1
        shown = summed(labels.tolist())
        pooled = texts.encode([canonical([*row[:2], 0, *row[3:]]) for row in labels.tolist()]).pooled
        assert pooled is not None
        return prior.prior_loss(network, shown + 0.1 * torch.randn(shown.shape, generator=generator), pooled, generator)

    def score() -> float:
        found = prior.recovered(network, texts, 64)  # type: ignore[arg-type]
        assert set(found) == set(ATTRIBUTES) - {"motion"}
        return min(found.values())

    before = score()
    job = Job(loss, list(network.parameters()), lambda folder: None, adam=[network.embed.weight, network.head.weight])
    job.learning_rate, job.average = 5e-3, 0.9
    result = engine.run(job, tmp_path, None, 150, lambda line: None, generator)
    assert result["loss"] < result["first_loss"] / 4
    assert before < 0.6 < 0.95 < score()
