"""The video UNet: equal to the library's on the same weights, an image model when fresh, CAM and APM visible parts."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet3DConditionModel
from torch import Tensor, nn

from streamt2v.errors import ConfigError
from streamt2v.models import layers
from streamt2v.models.cam import CamConfig, ConditionalAttention
from streamt2v.models.unet3d import CamFeatures, TextContext, UNet3D, UNet3DConfig, legal_canvas

SMALL = UNet3DConfig(
    block_out_channels=(16, 32, 32),
    attention_levels=(True, True, False),
    layers_per_block=1,
    cross_attention_dim=24,
    attention_head_dim=8,
    norm_num_groups=4,
    text_tokens=7,
)
PUBLISHED_REFINER = UNet3DConfig(downsample_padding=(2, 1))
WHOLE = replace(SMALL, image_tokens=3, cam=True, pooled_text_dim=12, frame_codes=True)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Give every parameter a value, zero-initialised ones included."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = 1 / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else 0.1
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(offset + scale * torch.randn(parameter.shape, generator=draws))


def library_unet(config: UNet3DConfig) -> UNet3DConditionModel:
    kinds = [("CrossAttn" if attention else "") for attention in config.attention_levels]
    return UNet3DConditionModel(
        block_out_channels=config.block_out_channels,
        down_block_types=tuple(f"{kind}DownBlock3D" for kind in kinds),
        up_block_types=tuple(f"{kind}UpBlock3D" for kind in reversed(kinds)),
        layers_per_block=config.layers_per_block,
        cross_attention_dim=config.cross_attention_dim,
        attention_head_dim=config.attention_head_dim,
        norm_num_groups=config.norm_num_groups,
    ).eval()


def text(batch: int = 2, config: UNet3DConfig = WHOLE) -> TextContext:
    pooled = torch.randn(batch, config.pooled_text_dim) if config.pooled_text_dim else None
    return TextContext(torch.randn(batch, config.text_tokens, config.cross_attention_dim), pooled)


def cam_features(config: UNet3DConfig, batch: int = 2, frames: int = 3, size: tuple[int, int] = (8, 12)) -> CamFeatures:
    """Random features of the sizes that the UNet's skips have."""
    sizes, (height, width) = [size], size
    for level in range(len(config.block_out_channels)):
        sizes += [(height, width)] * config.layers_per_block
        height, width = (height + 1) // 2, (width + 1) // 2
        sizes += [(height, width)] if level < len(config.block_out_channels) - 1 else []
    down = [torch.randn(batch, c, frames, *s) for c, s in zip(config.skip_channels, sizes, strict=True)]
    return CamFeatures(tuple(down), torch.randn(batch, config.block_out_channels[-1], frames, *sizes[-1]))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))


@pytest.mark.parametrize(
    ("size", "frames", "levels", "layers"),
    [((8, 12), 5, (True, True, False), 1), ((9, 7), 3, (True, True, True), 2), ((8, 8), 1, (False, True, False), 1)],
)
@torch.no_grad()
def test_equals_the_library_unet(size: tuple[int, int], frames: int, levels: tuple[bool, ...], layers: int) -> None:
    config = replace(SMALL, attention_levels=levels, layers_per_block=layers)
    ours, theirs = UNet3D(config).eval(), library_unet(config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())
    latents, tokens, timestep = torch.randn(2, 4, frames, *size), torch.randn(2, 7, 24), torch.tensor([17, 801])
    close(ours(latents, timestep, ours.prepare(TextContext(tokens))), theirs(latents, timestep, tokens).sample)


@torch.no_grad()
def test_the_refiner_is_the_library_unet_with_two_other_operations() -> None:
    """Rows are padded by two on the way down; on the way up the size is doubled and the outer rows are dropped."""
    config = replace(SMALL, downsample_padding=(2, 1))
    ours, theirs = UNet3D(config).eval(), library_unet(config)
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict())

    def upsample(module: Any) -> Callable[..., Tensor]:
        return lambda x, output_size=None: module.conv(F.interpolate(x, scale_factor=2.0)[:, :, 1:-1])

    for module in theirs.modules():
        for sampler in getattr(module, "downsamplers", None) or []:
            sampler.conv.padding = (2, 1)
        for sampler in getattr(module, "upsamplers", None) or []:
            sampler.forward = upsample(sampler)
    latents, tokens = torch.randn(1, 4, 3, 6, 8), torch.randn(1, 5, 24)
    close(ours(latents, 412, ours.prepare(TextContext(tokens))), theirs(latents, 412, tokens).sample)


@torch.no_grad()
def test_a_fresh_network_is_an_image_model_without_cam_and_apm() -> None:
    unet, context = UNet3D(WHOLE).eval(), text()
    latents = torch.randn(2, 4, 3, 8, 12)
    plain = unet(latents, 500, unet.prepare(context))
    close(unet(latents, 500, unet.prepare(context), temporal=False), plain)
    close(unet(latents[:, :, 1:2], 500, unet.prepare(context)), plain[:, :, 1:2])
    close(unet(latents, 500, unet.prepare(context), cam_features(WHOLE)), plain)
    close(unet(latents, 500, unet.prepare(context, torch.randn(2, 3, 24))), plain)


@torch.no_grad()
def test_every_part_has_an_effect_once_trained() -> None:
    unet, context = UNet3D(WHOLE).eval(), text()
    randomise(unet)
    latents, features, tokens = torch.randn(2, 4, 3, 8, 12), cam_features(WHOLE), torch.randn(2, 3, 24)
    plain = unet(latents, 500, unet.prepare(context))
    others = [
        unet(latents, 500, unet.prepare(context), features),
        unet(latents, 500, unet.prepare(context, tokens)),
        unet(latents, 500, unet.prepare(context), temporal=False),
        unet(latents, 501, unet.prepare(context)),
        unet(latents, 500, unet.prepare(TextContext(context.tokens, -context.pooled))),
        unet(latents, 500, unet.prepare(TextContext(-context.tokens, context.pooled))),
        unet(latents.flip(2), 500, unet.prepare(context)).flip(2),
    ]
    assert all(float((other - plain).norm() / plain.norm()) > 1e-3 for other in others)


@torch.no_grad()
def test_a_batch_is_its_rows_and_one_text_serves_several_latents() -> None:
    unet, context = UNet3D(WHOLE).eval(), text()
    randomise(unet)
    latents, features, tokens = torch.randn(2, 4, 3, 8, 12), cam_features(WHOLE), torch.randn(2, 3, 24)
    conditioning, timestep = unet.prepare(context, tokens), torch.tensor([100, 700])
    both = unet(latents, timestep, conditioning, features)
    for row in (0, 1):
        part = CamFeatures(tuple(f[row : row + 1] for f in features.down), features.mid[row : row + 1])
        alone = unet(latents[row : row + 1], timestep[row], conditioning.rows(slice(row, row + 1)), part)
        close(alone, both[row : row + 1])
    shared = unet(latents, 300, conditioning.rows(slice(1, 2)))
    repeated = unet.prepare(TextContext(context.tokens[[1, 1]], context.pooled[[1, 1]]), tokens[[1, 1]])  # type: ignore[index]
    close(shared, unet(latents, 300, repeated))


@torch.no_grad()
def test_work_in_pieces_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = UNet3D(SMALL).eval()
    randomise(unet)
    latents, conditioning = torch.randn(2, 4, 3, 8, 12), unet.prepare(text(config=SMALL))
    whole = unet(latents, 500, conditioning)
    monkeypatch.setattr(layers, "MAX_SEQUENCES", 50)
    layers.slice_feed_forwards(unet, 100)
    close(unet(latents, 500, conditioning), whole)


@torch.no_grad()
def test_latents_keep_their_precision_when_the_network_has_less() -> None:
    unet, context = UNet3D(WHOLE).eval(), text()
    randomise(unet)
    latents, tokens, features = torch.randn(2, 4, 3, 8, 12), torch.randn(2, 3, 24), cam_features(WHOLE)
    exact = unet(latents, 500, unet.prepare(context, tokens), features)
    unet.bfloat16()
    narrow = CamFeatures(tuple(feature.bfloat16() for feature in features.down), features.mid.bfloat16())
    found = unet(latents, 500, unet.prepare(context, tokens), narrow)
    assert found.dtype == torch.float32
    assert float((found - exact).norm() / exact.norm()) < 0.05


def test_gradients_reach_every_trainable_part() -> None:
    unet = UNet3D(WHOLE)
    randomise(unet)
    output = unet(
        torch.randn(2, 4, 3, 8, 12), torch.tensor([3, 900]), unet.prepare(text(), torch.randn(2, 3, 24)),
        cam_features(WHOLE),
    )  # fmt: skip
    output.square().mean().backward()
    silent = [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not silent


def test_settings_survive_json() -> None:
    for config in (WHOLE, PUBLISHED_REFINER):
        assert UNet3DConfig.from_dict(json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: replace(SMALL, attention_levels=(True,)), "attention_levels"),
        (lambda: replace(SMALL, norm_num_groups=5), "norm_num_groups"),
        (lambda: replace(SMALL, attention_head_dim=12), "attention_head_dim"),
        (lambda: replace(SMALL, frame_codes=True), "pooled_text_dim"),
        (lambda: replace(SMALL, downsample_padding=(3, 1)), "downsample_padding"),
        (lambda: UNet3DConfig.from_dict({"width": 3}), "width"),
        (lambda: UNet3D(SMALL).prepare(text()), "pooled"),
        (lambda: UNet3D(SMALL).prepare(TextContext(torch.zeros(1, 7, 20))), "20"),
        (lambda: UNet3D(SMALL).prepare(text(config=SMALL), torch.zeros(2, 3, 24)), "APM"),
        (lambda: UNet3D(WHOLE).prepare(text(), torch.zeros(2, 4, 24)), "tokens"),
        (lambda: plain_forward(cam_features(SMALL)), "mergers"),
        (lambda: plain_forward(None, replace(SMALL, downsample_padding=(2, 1))), "8x12"),
    ],
)
def test_what_does_not_fit_is_named(call: Callable[[], Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        call()


def plain_forward(cam: CamFeatures | None, config: UNet3DConfig = SMALL) -> Tensor:
    unet = UNet3D(config)
    return unet(torch.zeros(2, 4, 3, 8, 12), 1, unet.prepare(text(config=config)), cam)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("asked", "canvas"),
    [((720, 1280), (720, 1280)), ((720, 720), (720, 768)), ((256, 256), (272, 256)), ((1, 1), (16, 64))],
)
def test_the_published_refiner_wants_certain_canvases(asked: tuple[int, int], canvas: tuple[int, int]) -> None:
    assert legal_canvas(*asked, PUBLISHED_REFINER) == canvas


@torch.no_grad()
def test_a_canvas_is_legal_exactly_where_the_network_keeps_the_size() -> None:
    config = replace(SMALL, downsample_padding=(2, 1), transformer_in_heads=0)
    assert legal_canvas(37, 61, SMALL) == (40, 64)
    legal = [(h, w) for h in range(2, 15) for w in range(2, 13) if config.accepts(h, w)]
    assert legal == [(h, w) for h in (2, 6, 10, 14) for w in (4, 8, 12)]
    unet = UNet3D(config).eval()
    conditioning = unet.prepare(text(1, config))
    assert all(unet(torch.zeros(1, 4, 1, *size), 1, conditioning).shape[-2:] == size for size in legal)


@pytest.mark.parametrize(
    "config",
    [
        WHOLE,
        replace(WHOLE, layers_per_block=2, attention_levels=(False, True, False)),
        replace(SMALL, layers_per_block=2, downsample_padding=(2, 1)),
    ],
    ids=["whole", "two layers, no text above", "refiner"],
)
@torch.inference_mode()
def test_deep_features_of_the_same_step_change_nothing_and_nothing_deep_is_computed(config: UNet3DConfig) -> None:
    unet = UNet3D(config).eval()
    randomise(unet)
    extractor = None
    if config.cam:
        extractor = ConditionalAttention(CamConfig(replace(config, cam=False, image_tokens=0), (4, 6, 8), 2)).eval()
        randomise(extractor, seed=1)
    latents, context = torch.randn(2, 4, 3, 6, 8), text(2, config)
    prepared = unet.prepare(context)

    def run(deep: Tensor | None) -> tuple[Tensor, Tensor]:
        cam = None
        if extractor is not None:
            embedded = extractor.embed_frames(torch.ones(1, 2, 3, 24, 32))
            cam = extractor(latents[:, :, :2], 500, extractor.prepare(context), embedded, shallow=deep is not None)
        return unet.run(latents, 500, prepared, cam, deep)

    whole, deep = run(None)
    _, other = unet.run(torch.randn_like(latents), 900, prepared)
    for network in (unet, extractor):
        for name, level in () if network is None else network.named_children():
            if name == "down_blocks":
                level = nn.ModuleList([*level[1:], level[0].downsamplers])
            elif name == "up_blocks":
                level = level[:-1]
            if name in ("down_blocks", "mid_block", "up_blocks"):
                for parameter in level.parameters():
                    parameter.fill_(torch.nan)
    again, kept = run(deep)
    torch.testing.assert_close(again, whole, rtol=0, atol=0)
    assert kept is deep
    assert (run(other)[0] - whole).abs().max() > 0.01
