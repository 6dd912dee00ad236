"""Training of the demo's text and image encoders: one shared space in which every attribute value has its own axis.

The world's captions are sums of independent attributes. Both encoders learn to place a caption or a picture at the
sum of fixed orthogonal codes, one per attribute value. So changing one word moves the pooled vector equally far
whichever attribute it names (jointly trained encoders let direction words collapse), and matching pictures and captions
point the same way.
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedTokenizerFast,
)

from streamt2v.models.encoders import embed_image
from streamt2v.training.world.captions import MAX_TOKENS, UNSPECIFIED, canonical, compose, parse, tokenise
from streamt2v.training.world.drawing import render
from streamt2v.training.world.scenes import ATTRIBUTES, sample_scenes

DIM = 128
IMAGE_SIZE = 64
UNSEEN = 2  # position of the motion in the labels: a single frame does not show it
_SIZES = [len(words) for words in ATTRIBUTES.values()]
_LAYERS: dict[str, Any] = {
    "hidden_size": DIM,
    "intermediate_size": 4 * DIM,
    "projection_dim": DIM,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}


def build_text(vocab_size: int) -> CLIPTextModelWithProjection:
    """A fresh two-layer text encoder for the tokenizer of `captions`: pad 0, start 1, end 3."""
    tokens: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    config = CLIPTextConfig(**_LAYERS, **tokens, vocab_size=vocab_size, max_position_embeddings=MAX_TOKENS)
    return CLIPTextModelWithProjection(config)


def build_vision() -> CLIPVisionModelWithProjection:
    """A fresh two-layer image encoder on 64 x 64 pixels in patches of 8."""
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**_LAYERS, image_size=IMAGE_SIZE, patch_size=8))


def attribute_codes() -> Tensor:
    """Fixed orthogonal codes [sum of attribute sizes, DIM], so long that captions have unit variance per feature."""
    square, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(7)))
    codes: Tensor = square[: sum(_SIZES)] * (DIM / len(_SIZES)) ** 0.5
    return codes


def code_loss(embeddings: Tensor, labels: Tensor, codes: Tensor) -> Tensor:
    """Squared distance to the sum of the labels' codes plus cross-entropy per attribute.

    Args:
        embeddings: [B, DIM].
        labels: [B, 6], UNSPECIFIED where the attribute is absent.
        codes: result of `attribute_codes`.
    """
    target = torch.zeros_like(embeddings)
    entropy = embeddings.new_zeros(())
    offset = 0
    for column, size in enumerate(_SIZES):
        table, label = codes[offset : offset + size], labels[:, column]
        given = label != UNSPECIFIED
        target[given] += table[label[given]]
        if given.any():
            entropy = entropy + functional.cross_entropy(embeddings[given] @ table.T, label[given])
        offset += size
    return functional.mse_loss(embeddings, target) + 0.2 * entropy


def noisy_caption(labels: list[int], generator: torch.Generator) -> str:
    """A caption, in one case of six with a word that the tokenizer does not know and that must not matter."""
    words = compose(labels, generator).split()
    if torch.rand((), generator=generator) < 1 / 6:
        words.insert(int(torch.randint(len(words) + 1, (), generator=generator)), "?")
    return " ".join(words)


def text_loss(
    text: CLIPTextModelWithProjection,
    tokenizer: PreTrainedTokenizerFast,
    codes: Tensor,
    generator: torch.Generator,
    batch: int = 128,
) -> Tensor:
    """One training loss of the text encoder, on fresh captions."""
    captions = [noisy_caption(row, generator) for row in sample_scenes(batch, generator).labels().tolist()]
    parsed = torch.tensor([parse(caption) for caption in captions], device=codes.device)
    return code_loss(text(input_ids=tokenise(tokenizer, captions).to(codes.device)).text_embeds, parsed, codes)


def vision_loss(
    vision: CLIPVisionModelWithProjection, codes: Tensor, generator: torch.Generator, batch: int = 32
) -> Tensor:
    """One training loss of the image encoder, on fresh pictures, a little noisy."""
    scenes = sample_scenes(batch, generator).to(codes.device)
    pixels = render(scenes, torch.randint(0, 200, (batch, 1), generator=generator))[:, 0]
    labels = scenes.labels()
    labels[:, UNSEEN] = UNSPECIFIED
    strength = 0.1 * float(torch.rand((), generator=generator))
    pixels = pixels + strength * torch.randn(pixels.shape, generator=generator).to(pixels)
    return code_loss(embed_image(vision, pixels), labels, codes)


@torch.no_grad()
def swap_distances(text: CLIPTextModelWithProjection, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """How far swapping one attribute's word moves the pooled vector, relative to its length, per attribute."""
    generator = torch.Generator().manual_seed(3)
    rows = sample_scenes(64, generator).labels().tolist()
    device = text.device

    def embed(labels: list[list[int]]) -> Tensor:
        output: Tensor = text(input_ids=tokenise(tokenizer, [canonical(r) for r in labels]).to(device)).text_embeds
        return output

    plain = embed(rows)
    result = {}
    for column, (name, size) in enumerate(zip(ATTRIBUTES, _SIZES, strict=True)):
        swapped = [[(v + 1) % size if i == column else v for i, v in enumerate(r)] for r in rows]
        result[name] = float(((embed(swapped) - plain).norm(dim=1) / plain.norm(dim=1)).mean())
    return result


@torch.no_grad()
def image_accuracy(vision: CLIPVisionModelWithProjection, codes: Tensor, count: int = 128) -> dict[str, float]:
    """Share of held-out pictures whose attribute is nearest to the right code, for the attributes one frame shows."""
    generator = torch.Generator().manual_seed(77)
    scenes = sample_scenes(count, generator)
    frames = torch.randint(0, 200, (count, 1), generator=generator)
    pixels = render(scenes.to(codes.device), frames)[:, 0]
    return nearest_codes(embed_image(vision, pixels), scenes.labels(), codes)


def nearest_codes(embeddings: Tensor, labels: Tensor, codes: Tensor) -> dict[str, float]:
    """Share of embeddings [B, DIM] nearest to the codes of their labels [B, 6], per attribute that one frame shows."""
    result, offset = {}, 0
    for column, (name, size) in enumerate(zip(ATTRIBUTES, _SIZES, strict=True)):
        if column != UNSEEN:
            guess = (embeddings @ codes[offset : offset + size].T).argmax(1).cpu()
            result[name] = float((guess == labels[:, column]).float().mean())
        offset += size
    return result
