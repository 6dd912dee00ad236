"""The video denoiser: a UNet over frames, with visible places where CAM and APM plug in.

With both off it computes exactly what diffusers' `UNet3DConditionModel` does and shares its parameter names.
APM enters in `prepare` (what the text attentions look at); CAM enters in `forward` (features merged into the skips).

Shapes: B batch, F frames, Fc conditioning frames, N = B*F (frames innermost), C channels, S tokens, D features.
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from streamt2v.config import Table
from streamt2v.errors import ConfigError
from streamt2v.models.layers import (
    Attention,
    Downsample,
    FrameCode,
    KeysValues,
    ResnetBlock,
    SpatialTransformer,
    TemporalConv,
    TemporalTransformer,
    TextAttention,
    TimestepEmbedding,
    Upsample,
    as_clips,
    as_images,
    zero_init,
)
from streamt2v.models.spacetime import SpaceTimeResnet, SpaceTimeTransformer

SHALLOW_LAYERS = 2
"""Layers at the end of the way up, with the skips they take, that `UNet3D.run` always computes; all else is deep."""


@dataclass(frozen=True)
class UNet3DConfig(Table):
    """Sizes of a video UNet; the defaults are those of the published networks."""

    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    attention_levels: tuple[bool, ...] = (True, True, True, False)
    """Which levels have transformers; the middle always has."""
    layers_per_block: int = 2
    cross_attention_dim: int = 1024
    attention_head_dim: int = 64
    """Width of one head; a layer of C channels has C / attention_head_dim heads."""
    transformer_in_heads: int = 8
    """Heads of the temporal transformer after the first convolution; 0 leaves it out."""
    norm_num_groups: int = 32
    text_tokens: int = 77
    image_tokens: int = 0
    """Anchor tokens mixed into the text by APM; 0 leaves APM out."""
    cam: bool = False
    """Whether mergers for CAM features exist."""
    downsample_padding: tuple[int, int] = (1, 1)
    """(2, 1) pads rows by two and crops them again on the way up, as the published refiner does."""
    pooled_text_dim: int = 0
    """Width of a vector (pooled text, or waves of numbers) that joins the time embedding; 0 leaves it out."""
    frame_codes: bool = False
    """Text-dependent codes of the frame index in all temporal attention; needs `pooled_text_dim`."""
    blends_time: bool = False
    """Whether layers blend what they see in a frame and over time (see `spacetime`), not one after the other."""

    def __post_init__(self) -> None:
        if len(self.block_out_channels) != len(self.attention_levels):
            raise ConfigError(
                f"{len(self.block_out_channels)} block_out_channels but {len(self.attention_levels)} attention_levels"
            )
        for channels in self.block_out_channels:
            for divisor, name in (
                (self.norm_num_groups, "norm_num_groups"),
                (self.attention_head_dim, "attention_head_dim"),
            ):
                if channels % divisor:
                    raise ConfigError(f"{channels} channels cannot be divided by {name} = {divisor}")
        if self.frame_codes and not self.pooled_text_dim:
            raise ConfigError("frame_codes needs pooled_text_dim > 0")
        if self.frame_codes and self.blends_time:
            raise ConfigError("layers that blend time number their frames themselves: no frame_codes")
        if self.downsample_padding[1] != 1 or self.downsample_padding[0] not in (1, 2):
            raise ConfigError(f"downsample_padding is (1, 1) or (2, 1), not {self.downsample_padding}")

    @property
    def skip_channels(self) -> list[int]:
        """Widths of the features the way down hands to the way up, in the order they arise."""
        skips = [self.block_out_channels[0]]
        for channels in self.block_out_channels:
            skips += [channels] * (self.layers_per_block + 1)
        return skips[:-1]

    @property
    def texts_per_layer(self) -> int:
        """How many times a layer with attention looks at the text."""
        return 2 if self.blends_time else 1

    def accepts(self, height: int, width: int) -> bool:
        """Tell whether latents of height x width come back from the way down and up with their own size.

        Skips fix the size where the network upsamples to them; where it crops rows instead every level must be even.
        """
        if self.downsample_padding == (1, 1):
            return height > 0 and width > 0
        for _ in self.block_out_channels[1:]:
            if height % 2 or width % 2 or height < 2 or width < 2:
                return False
            height, width = height // 2 + 1, width // 2
        return True


def legal_canvas(height: int, width: int, config: Any, latent_factor: int = 8) -> tuple[int, int]:
    """Return the smallest canvas (H, W) in pixels, at least height x width, that VAE and network accept.

    The published refiner wants H = 16 (mod 64) and W = 0 (mod 64), the networks of pixels multiples of a cell.

    Args:
        height, width: of the content, pixels.
        config: sizes of a network, which say by `accepts` what latents fit.
        latent_factor: pixels a side of one latent cell covers.
    """
    period = latent_factor * 2 ** max(3, len(config.block_out_channels) - 1)
    heights = [h for h in range(height, height + period) if h % latent_factor == 0]
    widths = [w for w in range(width, width + period) if w % latent_factor == 0]
    return next((h, w) for h in heights for w in widths if config.accepts(h // latent_factor, w // latent_factor))


@dataclass(frozen=True)
class TextContext:
    """Encoded text: tokens [B, S, D] and, if the text encoder gives one, a pooled vector [B, P]."""

    tokens: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class Conditioning:
    """What a network needs of text and anchor frame: independent of timestep and frame, so made once per prompt.

    `keys_values` holds one entry per text attention in the order they run. B rows serve any multiple of B latents:
    each row serves consecutive ones.
    """

    keys_values: tuple[KeysValues, ...]
    pooled: Tensor | None = None

    def rows(self, rows: slice) -> "Conditioning":
        """Return some batch rows, e.g. one guidance branch where both do not fit in memory."""
        kept = tuple(KeysValues(kv.keys[rows], kv.values[rows]) for kv in self.keys_values)
        return Conditioning(kept, None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True)
class CamFeatures:
    """CAM's view of the conditioning frames: one feature [B, C, Fc, h, w] per UNet skip, and one after the middle.

    Of a shallow pass: for the first skips alone, and none of the middle.
    """

    down: tuple[Tensor, ...]
    mid: Tensor | None


@dataclass(frozen=True)
class Step:
    """What every block sees of one denoising step besides the features."""

    embedding: Tensor
    frames: int
    text: Iterator[KeysValues]
    pooled: Tensor | None
    temporal: bool
    shallow: bool
    """Whether the deep layers are left out, see `UNet3D.run`."""


class Level(nn.Module):
    """The layers of one resolution: [ResNet, temporal convolution, spatial and temporal transformer] x n.

    Or, with `blends_time`: [ResNet and transformer, each over space and time] x n.
    """

    def __init__(self, config: UNet3DConfig, inputs: Sequence[int], channels: int, attention_layers: int) -> None:
        super().__init__()
        groups, embedding_dim = config.norm_num_groups, 4 * config.block_out_channels[0]
        self.blends_time = config.blends_time
        if config.blends_time:
            self.resnets = nn.ModuleList(SpaceTimeResnet(c, channels, embedding_dim, groups) for c in inputs)
            self.attentions = nn.ModuleList(_blending(config, channels) for _ in range(attention_layers))
            return
        self.resnets = nn.ModuleList(ResnetBlock(c, channels, embedding_dim, groups) for c in inputs)
        self.temp_convs = nn.ModuleList(TemporalConv(channels, groups) for _ in inputs)
        heads = channels // config.attention_head_dim
        self.attentions = nn.ModuleList(_spatial(config, channels) for _ in range(attention_layers))
        self.temp_attentions = nn.ModuleList(_temporal(config, channels, heads) for _ in range(attention_layers))

    def layer(self, index: int, x: Tensor, step: Step) -> Tensor:
        """Run layer `index` on x [N, C_in, h, w]."""
        if self.blends_time:
            frames = step.frames if step.temporal else None
            x = self.resnets[index](x, step.embedding, frames)
            if index < len(self.attentions):
                x = self.attentions[index](x, next(step.text), next(step.text), frames)
            return x
        x = self.resnets[index](x, step.embedding)
        if step.temporal:
            x = self.temp_convs[index](x, step.frames)
        if index < len(self.attentions):
            x = self.attentions[index](x, next(step.text))
            if step.temporal:
                x = self.temp_attentions[index](x, step.frames, step.pooled)
        return x


class DownLevel(Level):
    """A level of the way down; `forward` returns the features after every layer, for the skips."""

    def __init__(
        self, config: UNet3DConfig, inputs: Sequence[int], channels: int, attention_layers: int, downsample: bool
    ) -> None:
        super().__init__(config, inputs, channels, attention_layers)
        self.downsamplers = nn.ModuleList([Downsample(channels, config.downsample_padding)] if downsample else [])

    def forward(self, x: Tensor, step: Step) -> list[Tensor]:
        outputs = [x]
        for index in range(len(self.resnets)):
            outputs.append(self.layer(index, outputs[-1], step))
        for downsample in self.downsamplers:
            outputs.append(downsample(outputs[-1]))
        return outputs[1:]


class MidLevel(Level):
    """The lowest level: one layer with attention, then one without."""

    def forward(self, x: Tensor, step: Step) -> Tensor:
        return self.layer(1, self.layer(0, x, step), step)


class UpLevel(Level):
    """A level of the way up; every layer takes one skip off the list."""

    def __init__(
        self, config: UNet3DConfig, inputs: Sequence[int], channels: int, attention_layers: int, upsample: bool
    ) -> None:
        super().__init__(config, inputs, channels, attention_layers)
        crop_rows = config.downsample_padding[0] - 1
        self.upsamplers = nn.ModuleList([Upsample(channels, crop_rows)] if upsample else [])

    def forward(self, x: Tensor, skips: list[Tensor], step: Step) -> Tensor:
        x = self.layers(range(len(self.resnets)), x, skips, step)
        for upsample in self.upsamplers:
            x = upsample(x, skips[-1].shape[-2:])
        return x

    def layers(self, indices: range, x: Tensor, skips: list[Tensor], step: Step) -> Tensor:
        """Run some of the layers."""
        for index in indices:
            x = self.layer(index, torch.cat([x, skips.pop()], dim=1), step)
        return x


def _text_attention(config: UNet3DConfig, channels: int) -> TextAttention:
    head_dim, context_dim = config.attention_head_dim, config.cross_attention_dim
    heads = channels // head_dim
    return TextAttention(channels, heads, head_dim, context_dim, config.text_tokens, config.image_tokens)


def _spatial(config: UNet3DConfig, channels: int) -> SpatialTransformer:
    text = _text_attention(config, channels)
    return SpatialTransformer(channels, config.attention_head_dim, config.norm_num_groups, text)


def _blending(config: UNet3DConfig, channels: int) -> SpaceTimeTransformer:
    text, time = _text_attention(config, channels), _text_attention(config, channels)
    return SpaceTimeTransformer(channels, config.attention_head_dim, config.norm_num_groups, text, time)


def _temporal(config: UNet3DConfig, channels: int, heads: int) -> TemporalTransformer:
    pooled_dim = config.pooled_text_dim
    return TemporalTransformer(
        channels, heads, config.attention_head_dim, config.norm_num_groups, config.frame_codes, pooled_dim
    )


class CamMerger(nn.Module):
    """Temporal cross-attention from UNet features S to CAM features E at every pixel (arXiv 2403.14773 section 4.1).

    S' = S + P_out(softmax(Q K^T / sqrt(d)) V), Q = Wq P_in(GroupNorm(S)), K = Wk E, V = Wv E; P_out starts at zero.
    """

    def __init__(self, channels: int, head_dim: int, groups: int, frame_codes: bool) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.attention = Attention(channels, channels // head_dim, head_dim)
        self.proj_out = nn.Linear(channels, channels)
        self.query_codes = FrameCode(channels) if frame_codes else None
        self.context_codes = FrameCode(channels) if frame_codes else None
        zero_init(self.proj_out)

    def forward(self, x: Tensor, frames: int, features: Tensor) -> Tensor:
        """Merge features [B, C, Fc, h, w] into x [N, C, h, w]."""
        clips = as_clips(x, frames)  # [B, C, F, P]
        query = self.proj_in(self.norm(clips).permute(0, 3, 2, 1).flatten(0, 1))  # [B*P, F, C]
        context = features.flatten(3).permute(0, 3, 2, 1).flatten(0, 1)  # [B*P, Fc, C]
        if self.query_codes is not None and self.context_codes is not None:
            query = query + self.query_codes(frames, query.device)
            context = context + self.context_codes(features.shape[2], context.device)
        merged = self.proj_out(self.attention(query, self.attention.keys_values(context)))  # [B*P, F, C]
        return as_images(clips + merged.unflatten(0, (len(clips), -1)).permute(0, 3, 2, 1), x.shape)


class CamMergers(nn.Module):
    """One merger for every skip and one after the middle."""

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__()

        def merger(channels: int) -> CamMerger:
            return CamMerger(channels, config.attention_head_dim, config.norm_num_groups, config.frame_codes)

        self.down = nn.ModuleList(merger(channels) for channels in config.skip_channels)
        self.mid = merger(config.block_out_channels[-1])


class UNetEncoder(nn.Module):
    """The first half of the UNet, up to the middle: shared by the denoiser and by CAM."""

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__()
        self.unet_config = config
        widths = config.block_out_channels
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimestepEmbedding(widths[0])
        self.transformer_in = (
            _temporal(config, widths[0], config.transformer_in_heads) if config.transformer_in_heads else None
        )
        self.text_embedding = _text_embedding(config) if config.pooled_text_dim else None
        self.down_blocks = nn.ModuleList()
        for level, channels in enumerate(widths):
            inputs = [widths[max(level - 1, 0)]] + [channels] * (config.layers_per_block - 1)
            attention_layers = config.layers_per_block if config.attention_levels[level] else 0
            last = level == len(widths) - 1
            self.down_blocks.append(DownLevel(config, inputs, channels, attention_layers, downsample=not last))
        self.mid_block = MidLevel(config, [widths[-1]] * 2, widths[-1], attention_layers=1)

    def text_attentions(self) -> Iterator[tuple[str, TextAttention]]:
        """Yield name and module of every text attention in the order they run."""
        yield from ((name, module) for name, module in self.named_modules() if isinstance(module, TextAttention))

    def prepare(self, text: TextContext, image_tokens: Tensor | None = None) -> Conditioning:
        """Compute everything that depends on text and anchor frame only.

        Args:
            text: tokens [B, S, D]; pooled [B, P] where the network has `pooled_text_dim`.
            image_tokens: [B, image_tokens, D] of the anchor frame; None switches APM off.

        Raises:
            ConfigError: the text or the tokens do not fit the network.
        """
        config = self.unet_config
        if (text.pooled is None) != (config.pooled_text_dim == 0):
            given = "none" if text.pooled is None else f"{text.pooled.shape[-1]} wide"
            raise ConfigError(f"pooled text: {given}, the network wants width {config.pooled_text_dim}")
        if text.tokens.shape[-1] != config.cross_attention_dim:
            raise ConfigError(f"text of width {text.tokens.shape[-1]}, the network wants {config.cross_attention_dim}")
        dtype = self.conv_in.weight.dtype
        tokens = text.tokens.to(dtype)
        image_tokens, pooled = (None if given is None else given.to(dtype) for given in (image_tokens, text.pooled))
        contexts = ((layer, layer.context(tokens, image_tokens)) for _, layer in self.text_attentions())
        return Conditioning(tuple(layer.keys_values(context) for layer, context in contexts), pooled)

    def begin(
        self, latents: Tensor, timestep: Tensor | float, conditioning: Conditioning, temporal: bool, shallow: bool
    ) -> Step:
        """Embed the timestep (scalar or [B]) and the pooled text, and line up what the blocks need for latents."""
        device = conditioning.keys_values[0].keys.device  # weights that wait on the host are elsewhere
        times = timestep.to(device) if isinstance(timestep, Tensor) else torch.full((1,), timestep, device=device)
        embedding = self.time_embedding(times.reshape(-1))
        pooled = conditioning.pooled
        if pooled is not None:
            pooled = pooled.repeat_interleave(len(latents) // len(pooled), dim=0)  # [B, P]
            if self.text_embedding is not None:
                embedding = embedding + self.text_embedding(pooled)
        texts = conditioning.keys_values
        if shallow:
            each = self.unet_config.texts_per_layer
            attends = self.unet_config.attention_levels[0]
            texts = (*texts[:each], *texts[-SHALLOW_LAYERS * each :]) if attends else ()
        return Step(embedding, latents.shape[2], iter(texts), pooled, temporal, shallow)

    def enter(self, latents: Tensor, step: Step) -> Tensor:
        """Bring latents [B, C, F, h, w] into the network: [N, C0, h, w]."""
        x = self.conv_in(latents.to(self.conv_in.weight.dtype).transpose(1, 2).flatten(0, 1))
        if self.transformer_in is not None and step.temporal:
            x = self.transformer_in(x, step.frames, step.pooled)
        return x

    def descend(self, x: Tensor, step: Step) -> list[Tensor]:
        """Run the way down on x [N, C0, h, w] and return every skip, x first, or those that the last layers take."""
        if step.shallow:
            return [x, cast(DownLevel, self.down_blocks[0]).layer(0, x, step)]
        skips = [x]
        for level in self.down_blocks:
            skips += level(skips[-1], step)
        return skips


class UNet3D(UNetEncoder):
    """The video denoiser.

    A fresh network is an image model: temporal layers, CAM mergers and APM mixing begin as identities.
    """

    def __init__(self, config: UNet3DConfig) -> None:
        super().__init__(config)
        self.config = config
        widths = config.block_out_channels[::-1]
        layers = config.layers_per_block + 1
        self.up_blocks = nn.ModuleList()
        skips = config.skip_channels
        below = widths[0]
        for level, channels in enumerate(widths):
            inputs = [(below if index == 0 else channels) + skips.pop() for index in range(layers)]
            attention_layers = layers if config.attention_levels[-1 - level] else 0
            last = level == len(widths) - 1
            self.up_blocks.append(UpLevel(config, inputs, channels, attention_layers, upsample=not last))
            below = channels
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)
        self.cam_mergers = CamMergers(config) if config.cam else None

    def text_attentions(self) -> Iterator[tuple[str, TextAttention]]:
        yield from super().text_attentions()
        levels = self.up_blocks.named_modules(prefix="up_blocks")
        yield from ((name, module) for name, module in levels if isinstance(module, TextAttention))

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        conditioning: Conditioning,
        cam: CamFeatures | None = None,
        temporal: bool = True,
    ) -> Tensor:
        """Predict noise, velocity or clean latents, whichever the network was trained for.

        Args:
            latents: noisy latents [B, C, F, h, w], any F >= 1, any precision: the network computes in its own. With
                `downsample_padding` (2, 1) only some sizes fit, see `legal_canvas`.
            timestep: training index 0..999, one or one per batch item.
            conditioning: result of `prepare`; its batch divides B.
            cam: features of the conditioning frames; None switches CAM off.
            temporal: False skips every temporal layer, so that frames are unrelated images.

        Returns:
            The prediction [B, C, F, h, w], in the precision of `latents`.
        """
        return self.run(latents, timestep, conditioning, cam, temporal=temporal)[0]

    def run(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        conditioning: Conditioning,
        cam: CamFeatures | None = None,
        deep: Tensor | None = None,
        temporal: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Predict as `forward` does, and return the prediction with the features [N, C, h, w] of the deep layers.

        These change little from step to step. Given those of an earlier step in `deep`, nothing but the first layer of
        the way down and the last `SHALLOW_LAYERS` of the way up is computed; `cam` is of a shallow pass then, too.

        Source: arXiv 2312.00858 (DeepCache).
        """
        batch, _, frames, height, width = latents.shape
        if not self.config.accepts(height, width):
            raise ConfigError(f"latents of {height}x{width} do not fit this network", "pad them to a legal canvas")
        step = self.begin(latents, timestep, conditioning, temporal, deep is not None)
        skips = self.descend(self.enter(latents, step), step)  # each [N, C, h, w]
        x = self.mid_block(skips[-1], step) if deep is None else deep
        if cam is not None:
            skips, x = self.merge(skips, x, frames, cam)
        *levels, last = cast(list[UpLevel], list(self.up_blocks))
        layers = range(len(last.resnets))
        if deep is None:
            for level in levels:
                x = level(x, skips, step)
            deep = x = last.layers(layers[:-SHALLOW_LAYERS], x, skips, step)
        x = last.layers(layers[-SHALLOW_LAYERS:], x, skips, step)
        x = self.conv_out(F.silu(self.conv_norm_out(x)))  # [N, C, h, w]
        return x.unflatten(0, (batch, frames)).transpose(1, 2).to(latents.dtype), deep

    def merge(self, skips: list[Tensor], x: Tensor, frames: int, cam: CamFeatures) -> tuple[list[Tensor], Tensor]:
        """Let every skip and the middle attend to CAM's features at the same place; the way down never sees CAM."""
        if self.cam_mergers is None:
            raise ConfigError("CAM features were given to a network without mergers", "use cam=None")
        pairs = zip(self.cam_mergers.down[: len(skips)], skips, cam.down, strict=True)
        merged = [merger(skip, frames, features) for merger, skip, features in pairs]
        return merged, x if cam.mid is None else self.cam_mergers.mid(x, frames, cam.mid)


def _text_embedding(config: UNet3DConfig) -> nn.Sequential:
    width = 4 * config.block_out_channels[0]
    last = nn.Linear(width, width)
    zero_init(last)
    return nn.Sequential(nn.Linear(config.pooled_text_dim, width), nn.SiLU(), last)
