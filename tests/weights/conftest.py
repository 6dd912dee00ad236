"""A small weights file, and a package folder with one small family."""

from pathlib import Path

import pytest
import torch

from streamt2v.models.apm import AppearanceTokens
from streamt2v.weights import catalog, networks

TOY = {"embed_dim": 4, "hidden_dim": 5, "num_tokens": 2, "context_dim": 3}
MANIFEST = """# a comment that stays
schema = 1

[families.tiny]
title = "for tests"
licence = "Apache-2.0"
preset = "demo"
vocabulary = ""

[families.tiny.components]
stream.apm = "tiny/apm.safetensors"
stream.tokenizer = "tiny/tokenizer.json"

[[files]]
path = "tiny/apm.safetensors"
bytes = 0
sha256 = ""
licence = "Apache-2.0"
what = "a \\"toy\\""

[[files]]
path = "tiny/tokenizer.json"
bytes = 0
sha256 = ""
licence = "Apache-2.0"
what = "words"
pad = "<pad>"
"""


@pytest.fixture
def apm() -> AppearanceTokens:
    torch.manual_seed(0)
    return AppearanceTokens(**TOY)


@pytest.fixture
def file(tmp_path: Path, apm: AppearanceTokens) -> Path:
    """A whole weights file of the smallest network."""
    path = tmp_path / "apm.safetensors"
    networks.save_module(path, apm)
    return path


@pytest.fixture
def root(tmp_path: Path, apm: AppearanceTokens) -> Path:
    """A package folder with one family, recorded."""
    from tokenizers import Tokenizer, models

    folder = tmp_path / "package"
    networks.save_module(folder / "tiny" / "apm.safetensors", apm)
    Tokenizer(models.WordLevel({"<pad>": 0, "ball": 1}, unk_token="<pad>")).save(
        str(folder / "tiny" / "tokenizer.json")
    )
    (folder / "weights.toml").write_text(MANIFEST)
    assert catalog.record(folder) == ["tiny/apm.safetensors", "tiny/tokenizer.json"]
    return folder
