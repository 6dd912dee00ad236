"""CLIP's towers: texts and pictures to vectors, by transformers that differ in how they begin and in what is read off.

They compute what transformers' CLIP models do, bit for bit, and share their parameter names and the part of their
interface that `encoders` uses; importing that library takes longer than a run's first steps.

Shapes: B batch, S tokens, D features, P features of the shared space. Source: arXiv 2103.00020.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError

_TRAINING = {"attention_dropout", "initializer_range", "initializer_factor", "pad_token_id", "bos_token_id"}
"""What the library's configuration says besides; nothing is computed with it here."""


@dataclass(frozen=True)
class _TowerConfig(Table):
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ConfigError(f"{self.hidden_size} features cannot be shared by {self.num_attention_heads} heads")
        if self.hidden_act not in ("gelu", "quick_gelu"):
            raise ConfigError(f"a CLIP tower with {self.hidden_act!r} is not supported")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from the library's configuration."""
        return super().from_dict({key: value for key, value in values.items() if key not in _TRAINING})


@dataclass(frozen=True)
class CLIPTextConfig(_TowerConfig):
    """Sizes of a text tower, in the library's terms; the defaults are the library's."""

    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407


@dataclass(frozen=True)
class CLIPVisionConfig(_TowerConfig):
    """Sizes of an image tower, in the library's terms; the defaults are the library's."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32


class Attention(nn.Module):
    """Attention of each token to all of them, or to none after it."""

    def __init__(self, config: _TowerConfig, causal: bool) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, causal
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in layers)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)  # [B, heads, S, head_dim]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with GELU, or with its cheap form x sigmoid(1.702 x)."""

    def __init__(self, config: _TowerConfig) -> None:
        super().__init__()
        self.quick = config.hidden_act == "quick_gelu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        return self.fc2(x * torch.sigmoid(1.702 * x) if self.quick else F.gelu(x))


class Layer(nn.Module):
    """Attention and feed-forward, each after a norm and added to its input."""

    def __init__(self, config: _TowerConfig, causal: bool) -> None:
        super().__init__()
        self.self_attn = Attention(config, causal)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = FeedForward(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Layers(nn.Module):
    """The layers of a tower."""

    def __init__(self, config: _TowerConfig, causal: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, causal) for _ in range(config.num_hidden_layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class TextEmbeddings(nn.Module):
    """Token numbers [B, S] to features of word and place [B, S, D]."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], device=ids.device)[None]
        return self.token_embedding(ids) + self.position_embedding(place)


class _Placed(nn.Module):
    """A network that says, as the libraries' do, where it is and what it computes in."""

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type of its weights."""
        return next(self.parameters()).dtype


class CLIPTextModel(_Placed):
    """The text tower alone: an object with `last_hidden_state` [B, S, D], after the final norm.

    No token looks at later ones, so a mask of what fills the text up would change nothing at its own.
    """

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Layers(config, causal=True)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        return SimpleNamespace(last_hidden_state=self.final_layer_norm(self.encoder(self.embeddings(input_ids))))


class CLIPTextModelWithProjection(_Placed):
    """The text tower, and `text_embeds` [B, P]: what it makes of the first end token, in the shared space."""

    def __init__(self, config: CLIPTextConfig) -> None:
        super().__init__()
        self.config = config
        self.text_model = CLIPTextModel(config)
        self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        encoded = self.text_model(input_ids)
        end = (input_ids == self.config.eos_token_id).int().argmax(dim=1)
        last = encoded.last_hidden_state[torch.arange(len(end), device=end.device), end]  # [B, D]
        return SimpleNamespace(last_hidden_state=encoded.last_hidden_state, text_embeds=self.text_projection(last))


class VisionEmbeddings(nn.Module):
    """Pictures [B, 3, size, size] to a class token, then one token a patch, each with its place: [B, S, D]."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        width, side = config.hidden_size, config.patch_size
        self.class_embedding = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.class_embedding, std=width**-0.5)
        self.patch_embedding = nn.Conv2d(config.num_channels, width, side, stride=side, bias=False)
        self.position_embedding = nn.Embedding((config.image_size // side) ** 2 + 1, width)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(patches), 1, -1)
        place = torch.arange(patches.shape[1] + 1, device=patches.device)
        return torch.cat([first, patches], dim=1) + self.position_embedding(place)


class VisionTower(nn.Module):
    """The image tower: pictures to what it makes of the class token [B, D]."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.embeddings = VisionEmbeddings(config)
        # The misspelling is that of the checkpoints.
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.encoder = Layers(config, causal=False)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layrnorm(self.embeddings(pixels)))[:, 0])


class CLIPVisionModelWithProjection(_Placed):
    """The image tower: an object with `image_embeds` [B, P], in the shared space."""

    def __init__(self, config: CLIPVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_model = VisionTower(config)
        self.visual_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def forward(self, pixel_values: Tensor) -> Any:
        return SimpleNamespace(image_embeds=self.visual_projection(self.vision_model(pixel_values)))
