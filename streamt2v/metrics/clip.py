"""CLIP for the metrics: which pair of encoders is available, its name in reports, texts and frames to vectors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from streamt2v import weights
from streamt2v.errors import ConfigError, WeightsError
from streamt2v.families import diffusers_pipelines
from streamt2v.media.frames import Frames
from streamt2v.metrics.scores import Series
from streamt2v.weights import home, hub

AUTO, DEMO = "auto", "demo"
PUBLISHED = "openai/clip-vit-large-patch14"
_FILES = ("config.json", "tokenizer.json", "model.safetensors")
_PAD = "<|endoftext|>"


@dataclass(frozen=True)
class Clip:
    """A text and an image encoder with a shared space; `name` says whose they are."""

    name: str
    tokenizer: Any
    text_encoder: Any
    image_encoder: Any

    def text(self, prompt: str) -> Series:
        """Encode a text: [D]."""
        import torch

        from streamt2v.models.encoders import encode_text

        with torch.inference_mode():
            pooled: Any = encode_text(self.tokenizer, self.text_encoder, [prompt]).pooled
        return _vector(pooled)

    def image(self, frame: Frames) -> Series:
        """Encode an RGB frame [H,W,3]: [D]."""
        import torch

        from streamt2v.media.frames import to_float
        from streamt2v.models.encoders import embed_image

        with torch.inference_mode():
            return _vector(embed_image(self.image_encoder, to_float(frame[None], self.image_encoder.device)))


def _vector(batch: Any) -> Series:
    return np.asarray(batch[0].float().cpu().numpy(), np.float64)


def load(name: str, device: str, note: hub.Note = lambda text: None) -> Clip:
    """Load a pair of encoders.

    Args:
        name: auto (the published CLIP if it was fetched before, else the demo family's), demo, hub:OWNER/NAME (fetched
            if it is not here), or a folder with a CLIP model of the transformers library.
        device: where the encoders go.
        note: called with the size before anything is fetched.

    Raises:
        ConfigError: the name is invalid.
        WeightsError: the files cannot be fetched, are damaged, or are not a CLIP.
    """
    if name == AUTO:
        fetched = {request.partition(" ")[0] for request in home.recorded("snapshots")}
        name = f"hub:{PUBLISHED}" if PUBLISHED in fetched else DEMO
    if name == DEMO:
        return _demo(device)
    folder, repository = Path(name).expanduser(), name.removeprefix("hub:")
    if name.startswith("hub:") and repository.count("/") == 1:
        folder = hub.snapshot(repository, None, _FILES, note)
    elif not folder.is_dir():
        raise ConfigError(f"there is no CLIP or folder named {name!r}", "use auto, demo, hub:OWNER/NAME or a folder")
    return _published(repository, folder, device)


def _demo(device: str) -> Clip:
    import torch

    family = weights.family(DEMO)
    roles = ("stream.tokenizer", "stream.text", "stream.image")
    parts = [weights.load(family, role, device, torch.float32) for role in roles]
    return Clip("the demo family's own pair, which knows only the demo's world", *parts)


def _published(name: str, folder: Path, device: str) -> Clip:
    import torch
    import transformers

    words = folder / "tokenizer.json"
    if not words.is_file():
        raise WeightsError(f"{folder} holds no tokenizer.json", "it must hold a CLIP as `save_pretrained` writes it")
    weights.quiet("transformers")
    dtype = torch.float32 if device == "cpu" else torch.float16
    encoders = [
        diffusers_pipelines.load_network(network, folder, dtype).to(device)
        for network in (transformers.CLIPTextModelWithProjection, transformers.CLIPVisionModelWithProjection)
    ]
    return Clip(name, weights.load_tokenizer(words, _PAD), *encoders)
