"""What a run needs: memory on its device, by stage, and room on the disk."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from streamt2v import memory, weights
from streamt2v.chunks import count, packed
from streamt2v.config import RunConfig
from streamt2v.families import choose
from streamt2v.weights import folders


def stages(config: RunConfig, source: tuple[int, int] | None = None) -> tuple[memory.Stage, ...]:
    """Return the stages of a run in numbers; `source` is the size (H, W) of a video that is only refined."""
    stream, refine, output = config.stream, config.refine, config.output
    base, found, own = source or stream.size, list[memory.Stage](), refine.model == choose.OWN
    packs = weights.family(config.model).pipeline
    if packs and (source is None or own):
        found.extend(_pipeline_stages(config, source))
    if source is None and not packs:
        parts = ["unet", "vae", *(["cam"] if stream.cam else []), *(["apm"] if stream.apm else [])]
        stage = _stage(config, "stream", parts, stream.chunk, base)
        windows = stream.replacement_lead if config.pictures or config.loop == "stream" else 1
        guided, kept = stream.guidance_scale != 1, windows * int(stream.reuse_interval > 1)
        found.append(replace(stage, guided=guided, cam=stream.cam, kept=kept))
    if refine.enabled and not (packs and own):
        box = (output.height or base[0], output.width or base[1])
        scale = min(box[0] / base[0], box[1] / base[1])
        canvas = box if output.fit == "cover" else (round(base[0] * scale), round(base[1] * scale))
        steps, chunk = refine.num_inference_steps, min(refine.chunk, config.made)
        stage = _stage(config, "refine", ["unet", "vae"], chunk, canvas)
        kept = memory.chunks_kept(steps, refine.reuse_interval, refine.chunk, refine.overlap)
        kept = min(kept, count(config.made, refine.chunk, refine.overlap))
        ahead = min((steps - 1) * (refine.chunk - refine.overlap), config.made - chunk) / chunk
        found.append(replace(stage, guided=refine.guidance_scale != 1, waits=True, kept=kept, ahead=ahead))
    if output.interpolate > 1:
        pixels = (output.height or base[0]) * (output.width or base[1])
        values = sum(file.num_values for file in weights.interpolator(output.interpolator).files)
        found.append(memory.Stage(values, frame_values=pixels, vae_features=memory.INTERPOLATING_VALUES))
    frames = min(refine.chunk if refine.enabled else stream.chunk, config.made)
    written = frames * (output.height or base[0]) * (output.width or base[1])
    return tuple(replace(stage, written=written) for stage in found)


def _pipeline_stages(config: RunConfig, source: tuple[int, int] | None) -> tuple[memory.Stage, ...]:
    """Return the text encoder, which goes before the others come, and what streams and refines, the same networks."""
    family, stream, refine, output = weights.family(config.model), config.stream, config.refine, config.output
    values, packs = folders.values(family.pipeline), folders.layout(family.pipeline)
    counted, base, side = folders.features(family.preset), source or stream.size, packs.cell * packs.token
    asked = [(stream.chunk, stream.guidance_scale, base)] if source is None else []
    if refine.enabled and refine.model == choose.OWN:
        scale = min((output.height or base[0]) / base[0], (output.width or base[1]) / base[1])
        box = (round(base[0] * scale), round(base[1] * scale))
        asked.append((min(refine.chunk, config.made), refine.guidance_scale, box))
    cells, pixels = [0], [0]
    for frames, _, size in asked:
        height, width = (-(-extent // packs.size_multiple) * packs.size_multiple for extent in size)
        cells.append(packed(frames, packs.frames_per_latent) * (height // side) * (width // side))
        pixels.append(int(height * width * (counted["per_pixel"] + counted["per_frame"] * frames)))
    empty = memory.Stage(values.get("text_encoder", 0))
    both = replace(
        empty,
        values=values.get("transformer", 0) + values.get("vae", 0),
        cells=max(cells),
        guided=any(guidance != 1 for _, guidance, _ in asked),
        frame_values=max(pixels),
        vae_features=1,
        token_values=int(packs.width * (counted["per_token"] + counted["timed"] * packs.timed)),
        wide_codec=True,
    )
    return empty, both


@dataclass(frozen=True)
class _Sizes:
    """Class and sizes of a stage's denoiser and VAE, as far as they are here; values of its networks."""

    unet_class: str
    unet: dict[str, Any]
    vae_class: str
    vae: dict[str, Any]
    values: int
    encoder_values: int
    unet_features: float = memory.UNET_FEATURES

    @property
    def vae_widths(self) -> list[int]:
        widths: list[int] = self.vae.get("block_out_channels", [128] * 4)
        return widths

    @property
    def latent_factor(self) -> int:
        """Pixels a side of one latent cell covers."""
        factor: int = 2 ** (len(self.vae_widths) - 1)
        return factor


def _sizes(config: RunConfig, stage: str, parts: Sequence[str] = ("unet", "vae")) -> _Sizes:
    """Return the sizes of a stage with these networks."""
    if stage == "refine" and config.refine.model != choose.OWN:
        return _foreign_sizes(config.refine.model)
    family = weights.family(config.model)

    def values(*roles: str) -> int:
        return sum(family.file(f"{stage}.{role}").num_values for role in roles if family.has(f"{stage}.{role}"))

    headers = (*_header(family, f"{stage}.unet"), *_header(family, f"{stage}.vae"))
    return _Sizes(*headers, values(*parts), values("text", "image"))


def _foreign_sizes(name: str) -> _Sizes:
    """Return the sizes of a third-party refiner; of one that is not here those of the published I2VGen-XL.

    Those of a base are not counted before it is here, as where it is the family.
    """
    folder = folders.here(name)
    if folder is None:
        sizes = (0, 0) if "preset" in weights.pipelines().get(name, {}) else (1_504_123_087, 985_060_864)
        return _Sizes("", {}, "", {}, *sizes, memory.LIBRARY_UNET_FEATURES)

    def values(*parts: str) -> int:
        return sum(folders.count(folder, part) for part in parts)

    def table(part: str) -> dict[str, Any]:
        try:
            found = json.loads((folder / part / "config.json").read_text("utf-8"))
        except (OSError, ValueError):  # which is said when it is loaded
            return {}
        return found if isinstance(found, dict) else {}

    unet, vae = table("unet"), table("vae")
    made = values("unet", "transformer", "vae"), values("text_encoder", "image_encoder")
    return _Sizes("", unet, str(vae.get("_class_name", "")), vae, *made, memory.LIBRARY_UNET_FEATURES)


def _stage(config: RunConfig, name: str, parts: Sequence[str], frames: int, size: tuple[int, int]) -> memory.Stage:
    """Return a stage by the sizes of its networks: so many frames of a size (H, W) at once."""
    sizes = _sizes(config, name, parts)
    unet, finest = sizes.unet, sizes.vae_widths
    widths = unet.get("block_out_channels", [320])
    # To multiples of 8 latent cells, which is as far as a canvas may have to grow.
    side = 8 * sizes.latent_factor
    rows, columns = (-(-extent // side) * 8 for extent in size)

    # Every other VAE sees one frame at a time.
    temporal = sizes.vae_class == "AutoencoderKLTemporalDecoder"
    decoded = min(config.picture.decode_chunk_size, frames) if temporal else 1
    stage = memory.Stage(
        values=sizes.values,
        encoder_values=sizes.encoder_values,
        cells=frames * rows * columns,
        frame_values=decoded * rows * columns * side**2 // 64 * finest[0],
        vae_features=memory.TEMPORAL_VAE_FEATURES if temporal else memory.VAE_FEATURES,
    )
    if sizes.unet_class == "Restorer":
        return replace(stage, kept_width=widths[0], restoring=unet["out_channels"])
    return replace(
        stage,
        unet_features=sizes.unet_features,
        width=widths[0],
        inner=max(widths[0], unet.get("transformer_in_heads", 8) * (unet.get("attention_head_dim") or 64)),
        # What comes from the first of the last level's layers, or from the level below where that has but two.
        kept_width=widths[0] if unet.get("layers_per_block", 2) > 1 else widths[:2][-1],
    )


def _header(family: weights.Family, role: str) -> tuple[str, dict[str, Any]]:
    """Class and sizes of the network of a role, as far as the family has it and it is here."""
    here = family.has(role) and all((family.root / part).is_file() for part in family.file(role).parts or ["-"])
    return weights.read_header(family.path(role))[:2] if here else ("", {})


def disk_bytes(config: RunConfig) -> int:
    """Estimate what run directory and output take, in bytes.

    Lossless base frames at half their size, the video twice, and the refiner's state: the newest two, and one more
    while it is written.
    """
    stream, output = config.stream, config.output
    base, written = stream.height * stream.width * 3 // 2, output.height * output.width // 4
    return config.made * base + config.num_frames * written + 3 * _state_bytes(config)


def _state_bytes(config: RunConfig) -> int:
    """Bytes of the refiner's state when frames were handed on.

    Of every frame in flight the latents, the last and the next estimate (a refiner of pixels keeps the source as well,
    but with the latents in 16 bit); of chunks whose deep layers are to be used again, their input.
    """
    refine, output, family = config.refine, config.output, weights.family(config.model)
    own = refine.model == choose.OWN
    if not refine.enabled or (own and not (family.has("refine.vae") or family.pipeline)):
        return 0
    frames = 1
    if own and family.pipeline:
        packs = folders.layout(family.pipeline)
        factor, channels, frames = packs.cell, packs.channels, packs.frames_per_latent
    else:
        sizes = _sizes(config, "refine")
        factor, channels = sizes.latent_factor, sizes.vae.get("latent_channels", 4)
        channels = sizes.unet["out_channels"] if sizes.unet_class == "Restorer" else channels
    cells: int = -(-output.height // factor) * -(-output.width // factor)
    stride = refine.chunk - refine.overlap
    sharing = -(-refine.chunk // stride) - 1  # later chunks that have frames of a chunk
    in_flight = refine.chunk if refine.shift_back else refine.overlap
    in_flight += (refine.num_inference_steps - 1) * stride * sharing
    in_flight += refine.chunk * (refine.reuse_interval > 1)
    return min(config.made, in_flight) // frames * 3 * channels * cells * 4
