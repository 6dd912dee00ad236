"""What a run needs: memory on its device, by stage, and room on the disk."""

from dataclasses import replace
from typing import Any

from streamt2v import memory, weights
from streamt2v.chunks import count, packed
from streamt2v.config import RunConfig
from streamt2v.weights import folders


def stages(config: RunConfig, source: tuple[int, int] | None = None) -> tuple[memory.Stage, ...]:
    """Return the stages of a run in numbers; `source` is the size (H, W) of a video that is only refined."""
    stream, refine, output = config.stream, config.refine, config.output
    if weights.family(config.model).pipeline:
        return _pipeline_stages(config, source)
    base, found = source or stream.size, list[memory.Stage]()
    if source is None:
        parts = ["unet", "vae", *(["cam"] if stream.cam else []), *(["apm"] if stream.apm else [])]
        stage = _stage(config, "stream", parts, stream.chunk, base)
        guided, kept = stream.guidance_scale != 1, int(stream.reuse_interval > 1)
        found.append(replace(stage, guided=guided, cam=stream.cam, kept=kept))
    if refine.enabled:
        box = (output.height or base[0], output.width or base[1])
        scale = min(box[0] / base[0], box[1] / base[1])
        canvas = box if output.fit == "cover" else (round(base[0] * scale), round(base[1] * scale))
        stage = _stage(config, "refine", ["unet", "vae"], min(refine.chunk, config.num_frames), canvas)
        kept = memory.chunks_kept(refine.num_inference_steps, refine.reuse_interval, refine.chunk, refine.overlap)
        chunks = count(config.num_frames, refine.chunk, refine.overlap)
        found.append(replace(stage, guided=refine.guidance_scale != 1, waits=True, kept=min(kept, chunks)))
    return tuple(found)


def _pipeline_stages(config: RunConfig, source: tuple[int, int] | None) -> tuple[memory.Stage, ...]:
    """Return the text encoder, which goes before the others come, and what streams and refines, the same networks."""
    family, stream, refine, output = weights.family(config.model), config.stream, config.refine, config.output
    values, packs = folders.values(family.pipeline), folders.layout(family.pipeline)
    counted, base, side = folders.features(family.preset), source or stream.size, packs.cell * packs.token
    asked = [(stream.chunk, stream.guidance_scale, base)] if source is None else []
    if refine.enabled:
        scale = min((output.height or base[0]) / base[0], (output.width or base[1]) / base[1])
        box = (round(base[0] * scale), round(base[1] * scale))
        asked.append((min(refine.chunk, config.num_frames), refine.guidance_scale, box))
    cells, pixels = [0], [0]
    for frames, _, size in asked:
        height, width = (-(-extent // packs.size_multiple) * packs.size_multiple for extent in size)
        cells.append(packed(frames, packs.frames_per_latent) * (height // side) * (width // side))
        pixels.append(int(height * width * (counted["per_pixel"] + counted["per_frame"] * frames)))
    empty = memory.Stage(values.get("text_encoder", 0), 0, 0, 0, 0, False, False, 0, 0, False, 0)
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


def _stage(config: RunConfig, name: str, parts: list[str], frames: int, size: tuple[int, int]) -> memory.Stage:
    """Return a stage by the sizes of its networks: so many frames of a size (H, W) at once."""
    family = weights.family(config.model)
    (kind, unet), (codec, vae) = _header(family, f"{name}.unet"), _header(family, f"{name}.vae")
    widths, finest = unet.get("block_out_channels", [320]), vae.get("block_out_channels", [128] * 4)
    # To multiples of 8 latent cells, which is as far as a canvas may have to grow.
    side = 8 * 2 ** (len(finest) - 1)
    rows, columns = (-(-extent // side) * 8 for extent in size)

    # Every other VAE sees one frame at a time.
    temporal = codec == "AutoencoderKLTemporalDecoder"
    decoded = min(config.picture.decode_chunk_size, frames) if temporal else 1

    def values(*roles: str) -> int:
        return sum(family.file(f"{name}.{role}").num_values for role in roles if family.has(f"{name}.{role}"))

    stage = memory.Stage(
        values=values(*parts),
        encoder_values=values("text", "image"),
        cells=frames * rows * columns,
        width=0,
        inner=0,
        guided=False,
        cam=False,
        frame_values=decoded * rows * columns * side**2 // 64 * finest[0],
        kept=0,
        waits=False,
        vae_features=memory.TEMPORAL_VAE_FEATURES if temporal else memory.VAE_FEATURES,
        kept_width=0,
    )
    if kind == "Restorer":
        return replace(stage, kept_width=widths[0], restoring=unet["out_channels"])
    return replace(
        stage,
        width=widths[0],
        inner=max(widths[0], unet.get("transformer_in_heads", 8) * unet.get("attention_head_dim", 64)),
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
    frames = stream.height * stream.width * 3 // 2 + output.height * output.width // 4
    return config.num_frames * frames + 3 * _state_bytes(config)


def _state_bytes(config: RunConfig) -> int:
    """Bytes of the refiner's state: of every frame in flight the latents, the last and the next estimate."""
    refine, output, family = config.refine, config.output, weights.family(config.model)
    if not refine.enabled or not (family.has("refine.vae") or family.pipeline):
        return 0
    frames = 1
    if family.pipeline:
        packs = folders.layout(family.pipeline)
        factor, channels, frames = packs.cell, packs.channels, packs.frames_per_latent
    else:
        _, vae = _header(family, "refine.vae")
        factor, channels = 2 ** (len(vae.get("block_out_channels", [128] * 4)) - 1), vae.get("latent_channels", 4)
    cells: int = -(-output.height // factor) * -(-output.width // factor)
    in_flight = refine.chunk + (refine.num_inference_steps - 1) * (refine.chunk - refine.overlap)
    return min(config.num_frames, in_flight) // frames * 3 * channels * cells * 4
