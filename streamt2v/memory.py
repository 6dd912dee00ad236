"""How a run fits into memory: what is loaded, computed and kept at the same time. Arithmetic only.

Peaks were counted on the networks of the published sizes (tensors without data, fused attention): a UNet holds at most
14 features of its finest level at once (I2VGen-XL in diffusers 15.5), or 6.5 and the inside of a feed-forward, which is
cut into slices of rows.
The VAE works on one frame at a time and holds 6 features of its size; a temporal decoder on several, and holds 8. A
restoration network works on a few frames at a time where it is widest; what its stage holds of a chunk was measured:
RESTORING_LATENTS times the latents, and AHEAD_LATENTS times those of frames that several steps keep besides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

UNET_FEATURES, FEATURES_BESIDE_FEED_FORWARD, CAM_FEATURES, VAE_FEATURES = 14, 6.5, 4, 6
TEMPORAL_VAE_FEATURES, RESTORING_LATENTS, AHEAD_LATENTS = 8, 3.2, 3
LIBRARY_UNET_FEATURES = 15.5
INTERPOLATING_VALUES = 280  # of 16 bit, for every pixel of a frame between two: 130 of 32 bit, and the frames
FEED_FORWARD_WIDTH = 16  # inside of a gated feed-forward: projection 8, gate 4, product 4 times as wide as its input
MARGIN, OWN_BYTES = 1.15, 600_000_000  # fragments of the allocator; libraries and contexts of a GPU
CPU_OWN_BYTES = 320_000_000  # libraries in the memory of a process, and what loading leaves behind: measured
WRITTEN_BYTES = 9  # for every pixel: the frames, and what the encoder keeps of them; measured
TILE_SHARE = 1 / 4  # of a picture: tiles of 256 pixels, whose results are kept
MANY_ROWS, FEW_ROWS = 1 << 17, 1 << 15
OFFLOADED_SHARE = 1 / 16  # of the weights, on the device at once: the largest layer and what waits to be freed


@dataclass(frozen=True)
class MemoryPolicy:
    """What is kept in memory and computed at once; part of a run's recipe, as other batches round differently."""

    precision: Literal["float32", "float16"]
    keep_networks: bool
    """Networks of all stages stay; else a stage ends and goes before the next begins."""
    batched_guidance: bool
    """Both branches of guidance in one batch; else one after the other."""
    feed_forward_rows: int
    """Rows that a feed-forward layer takes at once."""
    offload: bool
    """Weights stay on the host; each layer's come to the device while it runs."""
    encoders_on_host: bool = False
    """Text and image encoders, which run once, stay on the host, as do the features of waiting chunks. Where host and
    device share memory this saves nothing: the image encoder stays for the whole stage, and the allocator keeps what
    the text encoder took."""

    def describe(self, together: bool = False) -> str:
        """Describe the policy in words; `together`: stages are computed at the same time."""
        parts = [
            "16 bit" if self.precision == "float16" else "32 bit",
            "all stages at once" if together else "all stages loaded" if self.keep_networks else "one stage at a time",
            "guidance in one batch" if self.batched_guidance else "guidance in two passes",
        ]
        parts += ["small slices"] if self.feed_forward_rows < MANY_ROWS else []
        return ", ".join(parts + (["weights on the host"] if self.offload else []))


@dataclass(frozen=True)
class Stage:
    """A stage in numbers: values of its networks, latent cells of a chunk, channels of its widest features."""

    values: int
    encoder_values: int = 0
    """Values of the text and image encoders, which run once."""
    cells: int = 0
    width: int = 0
    inner: int = 0
    """Channels inside the first temporal transformer, which sees all cells."""
    guided: bool = False
    cam: bool = False
    frame_values: int = 0
    """Pixels that the VAE handles at once times channels of its finest level."""
    kept: int = 0
    """Chunks whose features of the deep layers are kept at once, from step to step."""
    waits: bool = False
    """Whether they wait while other chunks have their turn, so that the host can hold them."""
    kept_width: int = 0
    """Channels of these features."""
    vae_features: int = VAE_FEATURES
    """Features of that size that the VAE holds."""
    unet_features: float = UNET_FEATURES
    """Features of its finest level that a UNet holds."""
    restoring: int = 0
    """Channels of the latents of a restoration network on pixels, which has no features of the kind above; else 0."""
    ahead: float = 0.0
    """Frames that such a network works on at once besides those of a chunk, in chunks."""
    token_values: int = 0
    """Values for each cell, here a token, at the peak of a transformer, which has no such features either."""
    written: int = 0
    """Pixels of the frames that another thread writes meanwhile."""
    wide_codec: bool = False
    """Whether the VAE works in 32 bit where all networks stay, and else tile by tile where rows are few."""

    def features(self, policy: MemoryPolicy) -> float:
        """Values of features at the peak."""
        cells = self.cells * (2 if self.guided and policy.batched_guidance else 1)
        feed_forward = FEED_FORWARD_WIDTH * self.inner * min(cells, policy.feed_forward_rows)
        finest = self.width * cells
        unet = max(self.unet_features * finest, FEATURES_BESIDE_FEED_FORWARD * finest + feed_forward)
        kept = 0 if self.waits and policy.encoders_on_host else self.kept
        kept *= self.kept_width * self.cells * (2 if self.guided else 1)
        unet += self.cam * CAM_FEATURES * self.width * cells
        unet += self.restoring * (RESTORING_LATENTS + AHEAD_LATENTS * self.ahead) * cells
        decoder: float = self.vae_features * self.frame_values
        if self.wide_codec and policy.feed_forward_rows < MANY_ROWS:
            decoder = decoder * TILE_SHARE
        elif self.wide_codec and policy.keep_networks and policy.precision == "float16":
            decoder *= 2
        return max(unet + kept + self.token_values * cells, decoder)


def chunks_kept(steps: int, interval: int, chunk: int, overlap: int) -> int:
    """Return how many chunks of the refiner keep deep features at once, at most.

    In diagonal order about as many chunks are in flight as there are steps, times the neighbours on one side that a
    chunk shares frames with. All of them keep features, except those whose next step is a whole one. A last chunk that
    shifted back is one more.
    """
    neighbours = -(-chunk // (chunk - overlap)) - 1
    return 0 if interval == 1 else neighbours * (steps - -(-steps // interval)) + 2


def needed(stages: Sequence[Stage], policy: MemoryPolicy, together: bool = False) -> int:
    """Return the bytes at the peak of a run, without third-party models, which make the first frames before it.

    Args:
        stages: of the run.
        policy: how they are loaded and computed.
        together: they are computed at the same time, all of them loaded.
    """
    share = OFFLOADED_SHARE if policy.offload else 1
    if policy.keep_networks:
        loaded = sum(stage.values + stage.encoder_values for stage in stages) * share
        values = loaded + (sum if together else max)(stage.features(policy) for stage in stages)
    else:
        beside = 0 if policy.encoders_on_host else 1
        values = max(stage.values * share + stage.encoder_values * beside + stage.features(policy) for stage in stages)
    if policy.precision == "float16":
        return int(values * 2 * MARGIN) + OWN_BYTES
    written = max(stage.written for stage in stages) if policy.keep_networks else 0  # in the memory of a CPU alone
    return int(values * 4 * MARGIN) + WRITTEN_BYTES * written + CPU_OWN_BYTES  # only CPUs compute in 32 bit: `ladder`


def ladder(kind: str) -> list[MemoryPolicy]:
    """Return the policies of a device ("cpu", "cuda", "mps"), from the fastest to the most sparing."""
    precision: Literal["float32", "float16"] = "float32" if kind == "cpu" else "float16"
    host = kind == "cuda"  # elsewhere the host's memory is the device's
    found = [
        MemoryPolicy(precision, True, True, MANY_ROWS, False),
        MemoryPolicy(precision, False, True, MANY_ROWS, False, host),
        MemoryPolicy(precision, False, True, FEW_ROWS, False, host),
        MemoryPolicy(precision, False, False, FEW_ROWS, False, host),
    ]
    if host:
        found.append(MemoryPolicy(precision, False, False, FEW_ROWS, True, host))
    return found


def choose(free: int, stages: Sequence[Stage], kind: str) -> MemoryPolicy:
    """Pick the fastest policy that fits into `free` bytes of a device; else the most sparing."""
    known = ladder(kind)
    return next((policy for policy in known if needed(stages, policy) <= free), known[-1])


def more_sparing(policy: MemoryPolicy, kind: str) -> list[MemoryPolicy]:
    """Return the policies below one on the ladder of a device."""
    known = ladder(kind)
    return known[known.index(policy) + 1 :] if policy in known else known
