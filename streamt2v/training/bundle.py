"""The demo's files: building fresh networks, reading and writing them in one folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedTokenizerFast

from streamt2v import files
from streamt2v.errors import OutputError, WeightsError
from streamt2v.training.losses import DEMO_SCHEDULE
from streamt2v.training.world.captions import PAD, build_tokenizer, vocabulary
from streamt2v.weights import save_module
from streamt2v.weights.folders import INDEX, OURS

Network = TypeVar("Network", bound=nn.Module)


def write(folder: Path, name: str, network: nn.Module, denoiser: bool = False) -> None:
    """Write folder/name.safetensors in half precision; denoisers carry the demo's noise schedule."""
    save_module(folder / f"{name}.safetensors", network, asdict(DEMO_SCHEDULE) if denoiser else None)


def write_base(folder: Path, transformer: str) -> None:
    """Write model_index.json, which makes a base of a transformer and of the codec and text encoder beside it."""
    parts = {"transformer": transformer, "vae": "vae", "text_encoder": "text"}
    index: dict[str, object] = {name: [OURS, f"{part}.safetensors"] for name, part in parts.items()}
    index |= {"_class_name": "SpacetimePipeline", "tokenizer": [OURS, "tokenizer.json"], "pad": PAD}
    files.write_bytes(folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())


def read(folder: Path, name: str, network: Network) -> Network:
    """Load folder/name.safetensors into a network of the same sizes, as float32.

    Raises:
        WeightsError: the file is missing or does not fit.
    """
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        raise WeightsError(f"training needs {path}", f"train that part first: streamt2v train ... --out {folder}")
    try:
        network.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    except RuntimeError as error:
        raise WeightsError(f"{path} does not fit the network: {str(error).splitlines()[0]}") from error
    return network


def write_words(folder: Path) -> PreTrainedTokenizerFast:
    """Write tokenizer.json and vocabulary.json, where they are not there yet; returns the tokenizer."""
    tokenizer = build_tokenizer()
    words = {
        "tokenizer": tokenizer.backend_tokenizer.to_str(pretty=True),
        "vocabulary": json.dumps(vocabulary(), indent=1) + "\n",
    }
    for name, text in words.items():
        path = folder / f"{name}.json"
        if not _holds(path, text):
            try:
                files.write_bytes(path, text.encode())
            except OutputError:
                if not _holds(path, text):  # another part, which began at the same moment, may have written it
                    raise
    return tokenizer


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text("utf-8") == text


def freeze(network: Network, device: str = "cpu") -> Network:
    """Evaluation mode without gradients, on a device."""
    return network.to(device).eval().requires_grad_(False)


def train_only(network: nn.Module, parameters: list[nn.Parameter]) -> None:
    """Let these parameters learn, and no others of a network."""
    network.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)


def parameters_in(network: nn.Module, *parts: str) -> list[nn.Parameter]:
    """Parameters whose name contains one of the parts."""
    return [p for name, p in network.named_parameters() if any(part in name for part in parts)]


def seeded(seed: int) -> torch.Generator:
    """A seeded generator; the global one, which initial weights come from, is seeded too."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
