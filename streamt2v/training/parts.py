"""One training job for each part of the demo; `loop.train` picks one by name."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import nn

from streamt2v.models.apm import AppearanceTokens
from streamt2v.models.cam import ConditionalAttention, init_from_unet
from streamt2v.models.dit import SpacetimeTransformer
from streamt2v.models.unet3d import UNet3D
from streamt2v.training import bundle, denoisers
from streamt2v.training.batches import Batch
from streamt2v.training.critic import Critic
from streamt2v.training.denoisers import Lesson, OwnStates, TextSource, own_states, streamed
from streamt2v.training.engine import Job
from streamt2v.training.interpolation import interpolate_job
from streamt2v.training.losses import pixel_effect
from streamt2v.training.prior import prior_job
from streamt2v.training.refiner import refiner_job
from streamt2v.training.restorer import restore_job
from streamt2v.training.sheets import decoder_sheet, image_sheet, models, spacetime_sheet, streaming_sheet, text_sheet
from streamt2v.training.streams import OwnStreams, plain_or_own
from streamt2v.training.world import vae
from streamt2v.training.world.captions import build_tokenizer
from streamt2v.training.world.clips import CLIP_FRAMES, LONGEST, SIZES, WorldSource, encode
from streamt2v.training.world.encoders import (
    DIM,
    attribute_codes,
    build_text,
    build_vision,
    image_accuracy,
    swap_distances,
    text_loss,
    vision_loss,
)
from streamt2v.training.world.scenes import sample_scenes

MERGERS, MIXING = "cam_mergers.", ".apm."
TEMPORAL = ("temp_convs.", "temp_attentions.", "transformer_in.")
PATCHES = 1536  # that the spacetime transformer sees at once: 64 frames of 128x72
SHIPPED = Path(__file__).resolve().parents[1] / "demo"


@dataclass(frozen=True)
class Workshop:
    """Where a job works: `out` holds the parts made so far and takes the new one; `resume` holds one to continue.

    Parts that `out` lacks are taken from the package, so that any part can be trained alone.
    """

    out: Path
    device: str
    generator: torch.Generator
    resume: Path | None = None
    first: float = 1.0
    """Share of the usual number of examples rendered before the first step; small in tests."""

    def many(self, count: int) -> int:
        """A batch size for the device: `count` on a CPU, eight times as many on a GPU, which would otherwise idle."""
        return count if torch.device(self.device).type == "cpu" else 8 * count

    def faster(self, network: Any) -> Any:
        """Compile a network that learns, in place, on a GPU: launching its kernels takes longer than running them."""
        if torch.device(self.device).type == "cuda":
            network.compile(dynamic=False)
        return network

    def resumed(self, name: str, network: Any) -> Any:
        """Load weights to continue from, if any, and move the network to the device."""
        if self.resume is not None:
            bundle.read(self.resume, name, network)
        return network.to(self.device)

    def finished(self, name: str, network: Any, continued: bool = False) -> Any:
        """Load a finished part, or one that this job continues."""
        folders = [self.resume, self.out] if continued and self.resume is not None else [self.out]
        folder = next((f for f in folders if f is not None and (f / f"{name}.safetensors").is_file()), SHIPPED)
        return bundle.read(folder, name, network).to(self.device)

    def frozen(self, name: str, network: Any) -> Any:
        """Load a finished part that is only used."""
        return bundle.freeze(self.finished(name, network), self.device)

    def text(self) -> TextSource:
        """The finished text encoder."""
        tokenizer = build_tokenizer()
        return TextSource(tokenizer, self.frozen("text", build_text(len(tokenizer))))

    def lesson(self) -> Lesson:
        """The finished networks that the denoisers learn with."""
        codec, vision = self.frozen("vae", vae.build_vae()), self.frozen("vision", build_vision())
        latents = encode(codec, vae.held_out(16)[:, None])[:, :, 0]
        return Lesson(self.text(), codec, vision, pixel_effect(codec, latents), self.generator)

    def source(self, decoder: Any) -> WorldSource:
        """Batches of the drawn world; their examples are kept beside the weights."""
        return WorldSource(decoder, self.generator, self.out / "state" / "rings", first=self.first)


def vae_job(shop: Workshop) -> Job:
    """The VAE; whitened when it is saved."""
    network = shop.resumed("vae", vae.build_vae())
    batch = shop.many(8)

    def whitened() -> Any:
        white = copy.deepcopy(network).eval()
        vae.whiten(white, vae.held_out(96, 5).to(shop.device))
        return white

    def loss(progress: float) -> torch.Tensor:
        scenes = sample_scenes(batch, shop.generator).to(shop.device)
        return vae.vae_loss(network, *vae.training_frames(scenes, shop.generator), shop.generator)

    return Job(
        loss,
        list(network.parameters()),
        lambda folder: bundle.write(folder, "vae", whitened()),
        lambda folder: f"PSNR {vae.psnr(whitened(), vae.held_out().to(shop.device)):.2f} dB",
        adam=bundle.parameters_in(network, "conv_in.weight", "conv_out.weight"),
        learning_rate=2e-3,
        average=0.998,
        samples=batch,
        device=shop.device,
        half=True,
    )


def text_job(shop: Workshop) -> Job:
    """The text encoder."""
    tokenizer = bundle.write_words(shop.out)
    text = shop.resumed("text", build_text(len(tokenizer)))
    codes = attribute_codes().to(shop.device)
    batch = shop.many(128)
    return Job(
        lambda progress: text_loss(text, tokenizer, codes, shop.generator, batch),
        list(text.parameters()),
        lambda folder: bundle.write(folder, "text", text),
        lambda folder: f"swap distances {swap_distances(text, tokenizer)}",
        adam=bundle.parameters_in(text, "embedding"),
        learning_rate=2e-3,
        samples=batch,
        device=shop.device,
    )


def vision_job(shop: Workshop) -> Job:
    """The image encoder."""
    vision = shop.resumed("vision", build_vision())
    codes = attribute_codes().to(shop.device)
    batch = shop.many(32)
    return Job(
        lambda progress: vision_loss(vision, codes, shop.generator, batch),
        list(vision.parameters()),
        lambda folder: bundle.write(folder, "vision", vision),
        lambda folder: f"recognised {image_accuracy(vision, codes)}",
        adam=bundle.parameters_in(vision, "embedding"),
        learning_rate=2e-3,
        samples=batch,
        device=shop.device,
    )


def images_job(shop: Workshop) -> Job:
    """The base's spatial layers on single frames: most of what pictures need, at a sixteenth of a clip's price."""
    network = shop.faster(shop.resumed("unet", UNet3D(denoisers.BASE)))
    lesson = shop.lesson()
    source = shop.source(lesson.vae)
    batch = shop.many(64)
    left = {id(p) for p in bundle.parameters_in(network, MERGERS, MIXING, *TEMPORAL)}
    return Job(
        lambda progress: denoisers.image_loss(network, source.images(batch), lesson),
        [p for p in network.parameters() if id(p) not in left],
        lambda folder: bundle.write(folder, "unet", network, denoiser=True),
        lambda folder: image_sheet(folder / "images.png", network, lesson),
        adam=_rims(network),
        learning_rate=2e-3,
        average=0.999,
        samples=batch,
        device=shop.device,
        keep=source.save,
    )


def base_job(shop: Workshop) -> Job:
    """The base video model on clips, from the images' weights; in one step of three on its own mistakes.

    CAM's mergers and APM's mixing are in the same file, untouched: they belong to the next jobs.
    """
    network = shop.faster(shop.finished("unet", UNet3D(denoisers.BASE), continued=True))
    lesson = shop.lesson()
    source = shop.source(lesson.vae)
    turn = count()
    batch = shop.many(4)

    mistakes = _mistakes(network, lambda: source.clips(batch), lesson)

    def loss(progress: float) -> torch.Tensor:
        clips = mistakes.draw(batch) if next(turn) % 3 == 2 else source.clips(batch, pairs=1)
        return denoisers.video_loss(network, clips, lesson)

    other = {id(p) for p in bundle.parameters_in(network, MERGERS, MIXING)}
    return Job(
        loss,
        [p for p in network.parameters() if id(p) not in other],
        lambda folder: bundle.write(folder, "unet", network, denoiser=True),
        lambda folder: text_sheet(folder / "base.png", models(network, lesson.vae), lesson.text),
        adam=_rims(network) + bundle.parameters_in(network, "frame_codes"),
        learning_rate=1.5e-3,
        average=0.998,
        samples=batch * CLIP_FRAMES,
        device=shop.device,
        keep=source.save,
    )


def _mistakes(unet: UNet3D, draw: Callable[[], Batch], lesson: Lesson, capacity: int = 256) -> OwnStates:
    """What the base makes of clips that were noised part of the way, and of their captions."""

    @torch.no_grad()
    def make() -> Batch:
        clips = draw()
        conditioning = unet.prepare(lesson.text.encode(clips.captions))
        own = own_states(lambda x, t: unet(x, t, conditioning), clips.latents, 6, lesson.generator)
        return replace(clips, own=own)

    return OwnStates(make, lesson.generator, capacity)


def decoder_job(shop: Workshop) -> Job:
    """The VAE's decoder alone, half on clean latents and half on what the base makes of them, which it learns to mend.

    A critic sees to it that edges are drawn where latents leave them open. The encoder, and so the latent space that
    all denoisers know, stays as it is.
    """
    network = shop.finished("vae", vae.build_vae(), continued=True)
    unet = shop.frozen("unet", UNet3D(denoisers.BASE))
    lesson = shop.lesson()
    source = shop.source(lesson.vae)
    trained = bundle.parameters_in(network, "decoder.", "post_quant_conv.")
    bundle.train_only(network, trained)
    critic = Critic().to(shop.device)
    mistakes = _mistakes(unet, lambda: source.pictured(2), lesson, capacity=64)

    def loss(progress: float) -> torch.Tensor:
        clips = mistakes.draw(4)
        frames = torch.randint(CLIP_FRAMES, (2,), generator=shop.generator).tolist()
        assert clips.shown is not None and clips.own is not None
        latents = torch.cat([clips.latents[:, :, frames[0]], clips.own[:, :, frames[1]]])
        pixels, masks = (torch.cat([clip[:, frame] for frame in frames]) for clip in (clips.shown, clips.mask))
        made = vae.lightened(network.decode(latents).sample.float())
        pixels = vae.lightened(pixels)
        error = vae.picture_error(made, pixels, masks[:, None])
        return critic.loss(error, made, pixels, network.decoder.conv_out.weight)

    return Job(
        loss,
        [*trained, *critic.parameters()],
        lambda folder: bundle.write(folder, "vae", network),
        lambda folder: decoder_sheet(folder / "decoder.png", network, vae.held_out().to(shop.device)),
        adam=[*bundle.parameters_in(network, "conv_out.weight"), *critic.parameters()],
        learning_rate=5e-4,
        average=0.998,
        samples=8,
        device=shop.device,
        half=True,
        keep=source.save,
    )


def cam_job(shop: Workshop) -> Job:
    """CAM and its mergers, the base frozen: the paper's first phase."""
    return _streaming_job(shop, with_apm=False)


def apm_job(shop: Workshop) -> Job:
    """CAM, mergers, APM's mixing and token network, the base frozen: the paper's second phase."""
    return _streaming_job(shop, with_apm=True)


def joint_job(shop: Workshop) -> Job:
    """Base, CAM and APM together: three steps in four with CAM and APM, one with both off.

    That one keeps the base a good initializer. Where time is short this beats the frozen phases, because the base goes
    on learning.
    """
    return _streaming_job(shop, with_apm=True, with_base=True)


def _streaming_job(shop: Workshop, with_apm: bool, with_base: bool = False) -> Job:
    unet, cam, apm = _streaming_networks(shop, with_apm)
    lesson = shop.lesson()
    parts = (apm, lesson.vision) if with_apm else None
    source, batch, turn = shop.source(lesson.vae), shop.many(4), count()
    open_parts = ("",) if with_base else (MERGERS, MIXING) if with_apm else (MERGERS,)
    trained = [*bundle.parameters_in(unet, *open_parts), *cam.parameters(), *(apm.parameters() if with_apm else ())]
    bundle.train_only(unet, trained)

    def save(folder: Path) -> None:
        bundle.write(folder, "unet", unet, denoiser=True)
        bundle.write(folder, "cam", cam)
        if with_apm:
            bundle.write(folder, "apm", apm)

    @torch.no_grad()
    def continued_wrongly() -> Batch:
        chunks = source.chunks(batch)
        denoise = streamed(unet, cam, parts, chunks, lesson, dropping=False)
        return replace(chunks, own=own_states(denoise, chunks.latents, 8, shop.generator))

    own_chunks = OwnStates(continued_wrongly, shop.generator)
    own_clips = _mistakes(unet, lambda: source.clips(batch), lesson)
    own_streams = OwnStates(OwnStreams(models(unet, lesson.vae, cam, parts), lesson).make, shop.generator)

    def loss(progress: float) -> torch.Tensor:
        index = next(turn)
        if with_base and index % 4 == 0:
            clips = own_clips.draw(batch) if index % 8 == 4 else source.clips(batch, pairs=1)
            return denoisers.video_loss(unet, clips, lesson)
        if with_base and index % 4 == 3:
            chunks = plain_or_own(own_streams.draw(batch), shop.generator)
        else:
            chunks = own_chunks.draw(batch) if index % 4 == 2 else source.chunks(batch)
        return denoisers.streaming_loss(unet, cam, parts, chunks, lesson)

    adam = [*_rims(cam), *bundle.parameters_in(cam, "_codes"), *bundle.parameters_in(unet, MIXING, "_codes")]
    return Job(
        loss,
        trained,
        save,
        lambda folder: streaming_sheet(folder / "streaming.png", models(unet, lesson.vae, cam, parts), lesson.text),
        adam=adam + (_rims(unet) if with_base else []),
        quick=[*bundle.parameters_in(unet, MERGERS, ".apm.alpha"), *bundle.parameters_in(cam, "cond_embedding")],
        learning_rate=1e-3,
        average=0.998,
        samples=batch * CLIP_FRAMES,
        device=shop.device,
        keep=source.save,
    )


def _streaming_networks(shop: Workshop, with_apm: bool) -> tuple[UNet3D, ConditionalAttention, AppearanceTokens]:
    """Base, CAM and APM, continued where there is something to continue, else CAM as a copy of the base's encoder."""
    unet = shop.faster(shop.finished("unet", UNet3D(denoisers.BASE), continued=True))
    cam = ConditionalAttention(denoisers.CAM)
    apm = AppearanceTokens(DIM, 2 * DIM, denoisers.IMAGE_TOKENS, DIM)
    continued = shop.resume or (shop.out if with_apm else None)
    if continued is None or not (continued / "cam.safetensors").is_file():
        init_from_unet(cam, unet)
        align_mergers(unet)
    else:
        bundle.read(continued, "cam", cam)
    if with_apm and continued is not None and (continued / "apm.safetensors").is_file():
        bundle.read(continued, "apm", apm)
    return unet, cam.to(shop.device), apm.to(shop.device)


@torch.no_grad()
def align_mergers(unet: UNet3D) -> None:
    """Let every merger begin by looking at the conditioning frame of its own number, or the nearest.

    Queries and keys get the same projection and the same strong frame code. From random ones, the mergers would first
    average over all conditioning frames and take hundreds of steps to tell them apart.
    """
    if unet.cam_mergers is None:
        return
    for merger in (*unet.cam_mergers.down, unet.cam_mergers.mid):
        attention = merger.attention
        attention.to_k.weight.copy_(attention.to_q.weight)
        merger.query_codes.position.weight.normal_(std=1.2)
        merger.context_codes.position.weight.copy_(merger.query_codes.position.weight)


def image_to_video_job(shop: Workshop) -> Job:
    """A copy of the base that also sees the latents of its first frame; one batch in five is of loops."""
    network = UNet3D(denoisers.IMAGE_TO_VIDEO)
    if shop.resume is not None:
        bundle.read(shop.resume, "image_to_video", network)
    else:
        network.load_state_dict(widened(shop, denoisers.IMAGE_TO_VIDEO.in_channels, MERGERS, MIXING))
    shop.faster(network.to(shop.device))
    lesson = shop.lesson()
    source, batch, turn = shop.source(lesson.vae), shop.many(4), count()

    def loss(progress: float) -> torch.Tensor:
        loop = next(turn) % 5 == 4
        return denoisers.image_to_video_loss(network, source.first_frames(batch, loop), lesson, loop)

    return Job(
        loss,
        list(network.parameters()),
        lambda folder: bundle.write(folder, "image_to_video", network, denoiser=True),
        adam=_rims(network) + bundle.parameters_in(network, "frame_codes"),
        quick=list(network.conv_in.parameters())[:1],  # the weight: its new channels start at zero
        learning_rate=1.5e-3,
        samples=batch * CLIP_FRAMES,
        device=shop.device,
        keep=source.save,
    )


def dit_job(shop: Workshop) -> Job:
    """The transformer over patches of space and time, from nothing: pictures, clips of many sizes and lengths.

    One step in three is on pictures, the others on clips, half of which go on from known frames. The folder becomes a
    model family: `--model DIR`.
    """
    network = shop.resumed("dit", SpacetimeTransformer(denoisers.DIT))
    lesson = shop.lesson()
    source, turn = shop.source(lesson.vae), count()
    down, across = denoisers.DIT.patch

    def drawn(most: int) -> int:
        return int(torch.randint(most, (), generator=shop.generator))

    def batch() -> Batch:
        if (index := next(turn)) % 3 == 0:
            return source.images(shop.many(PATCHES // 24))
        size = SIZES[drawn(len(SIZES))] if drawn(2) else SIZES[0]
        length = 8 + drawn(LONGEST - 7)
        patches = length * -(-size[0] // (8 * down)) * -(-size[1] // (8 * across))
        return source.pieces(shop.many(max(1, PATCHES // patches)), size, length, continued=index % 3 == 2)

    def save(folder: Path) -> None:
        bundle.write(folder, "dit", network)
        for name, part in (("vae", lesson.vae), ("text", lesson.text.encoder)):
            if not (folder / f"{name}.safetensors").is_file():
                bundle.write(folder, name, part)
        bundle.write_base(folder, "dit")

    return Job(
        lambda progress: denoisers.spacetime_loss(network, batch(), lesson),
        list(network.parameters()),
        save,
        lambda folder: spacetime_sheet(folder / "dit.png", network, lesson),
        adam=bundle.parameters_in(network, "embed.", "bearing.", "head."),
        learning_rate=2e-3,
        average=0.999,
        samples=shop.many(PATCHES // 24),
        device=shop.device,
        keep=source.save,
    )


def widened(shop: Workshop, channels: int, *without: str) -> dict[str, torch.Tensor]:
    """The base's weights, less some, with so many input channels: those added start at zero."""
    start = shop.finished("unet", UNet3D(denoisers.BASE)).cpu().state_dict()
    state = {key: value for key, value in start.items() if not any(part in key for part in without)}
    entry = start["conv_in.weight"]
    state["conv_in.weight"] = torch.cat([entry, entry.new_zeros(len(entry), channels - entry.shape[1], 3, 3)], 1)
    return state


def _rims(network: UNet3D | ConditionalAttention) -> list[nn.Parameter]:
    """First and last convolutions, whose shapes do not suit Muon."""
    return bundle.parameters_in(network, "conv_in.weight", "conv_out.weight")


JOBS: dict[str, Callable[[Workshop], Job]] = {
    "vae": vae_job,
    "text": text_job,
    "vision": vision_job,
    "images": images_job,
    "base": base_job,
    "decoder": decoder_job,
    "cam": cam_job,
    "apm": apm_job,
    "joint": joint_job,
    "image_to_video": image_to_video_job,
    "prior": prior_job,
    "dit": dit_job,
    "refiner": refiner_job,
    "restore": restore_job,
    "interpolate": interpolate_job,
}
