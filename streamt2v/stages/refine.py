"""Stage 3, refinement: SDEdit in overlapping chunks with randomized blending, for any length at constant memory.

Every denoising step blends the chunks in a new way (arXiv 2403.14773 section 4.3): in an overlap a random cut decides
up to which frame the left chunk's clean estimate is used. Step s of a chunk needs only step s-1 of the chunks that
share frames with it. So the stage need not sweep over the whole video for each step: chunk k runs step s as soon as
chunk k+1 has run step s-1, and a window of about as many chunks as there are steps slides along the video (diagonal
order). A chunk-step is a function of the latents at its level and of addressed draws, so both orders give the same
numbers. Where deep layers are computed at every n-th step only, it also depends on the chunk's latents at its last
whole step.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, Protocol

import torch
from torch import Tensor

from streamt2v.chunks import Around, Chunk, covering
from streamt2v.config import RefineConfig
from streamt2v.devices import send
from streamt2v.diffusion import blend, solvers
from streamt2v.diffusion.noise import Draws
from streamt2v.diffusion.schedules import NoiseSchedule
from streamt2v.errors import ConfigError, NumericsError
from streamt2v.models.restorer import RestorerConfig
from streamt2v.models.unet3d import Conditioning, TextContext
from streamt2v.stages.denoise import Predict, guided, reusing

Encode = Callable[[int], Tensor]
"""Clean latents [C, h, w] of a frame of the source; asked once for every frame, in order."""


class Told(Protocol):
    """What a network is told of a chunk besides its latents, for both branches of guidance."""

    def rows(self, rows: slice) -> Any:
        """Return it for some of the branches."""
        ...


def sees_source(config: Any) -> bool:
    """Tell whether a refiner network of these sizes takes the source's latents beside the noisy ones."""
    return isinstance(config, RestorerConfig)


def refiner_conditioning(network: Any, text: TextContext | None, scale: float) -> Conditioning:
    """Compute what a refiner network needs that depends on neither timestep nor frame.

    Args:
        network: a UNet, which reads the text, or a restoration network, which is told the scale.
        text: rows (negative, positive), None for a family whose refiner reads none.
        scale: how many times the source was enlarged, at least 1.
    """
    conditioning: Conditioning = network.prepare(scale if sees_source(network.config) else text)
    return conditioning


@dataclass(frozen=True)
class Denoiser:
    """The refiner network's `run` (or its compiled form), its schedule and what it is told of every chunk.

    `run` takes latents, timestep, text, None for CAM, features of the deep layers or None and, where the network
    `sees_source`, the source's clean latents and whether to keep features; it returns prediction and features.
    `batched` as in `denoise.Sampling`; `place` is where features wait for other chunks, None: where they are made.
    """

    run: Callable[..., tuple[Tensor, Tensor]]
    schedule: NoiseSchedule
    text: Callable[[Chunk], Told]
    batched: bool = True
    place: str | None = None
    sees_source: bool = False
    first_cut: int = 0
    """Frames at the beginning of a later chunk that never own themselves, at most its overlap."""

    def predictor(
        self, chunk: Chunk, source: list[Tensor] | None, kept: dict[int, Tensor] | None = None, reuses: bool = False
    ) -> Predict:
        """Return the network with the text and the source's latents, F times [C, h, w], of a chunk, if it sees them.

        Its deep features are taken from `kept`, or kept there.
        """
        text = self.text(chunk)

        def run(latents: Tensor, timestep: int, rows: slice, deep: Tensor | None) -> tuple[Tensor, Tensor]:
            # As a tensor: for every new plain number compiled code would be compiled again.
            time = torch.full((1,), timestep, device=latents.device)
            beside = () if source is None else (source, kept is not None)
            return self.run(latents, time, text.rows(rows), None, deep, *beside)

        return reusing(run, kept, lambda _: reuses, self.place)


@dataclass
class RefineState:
    """Everything in flight: per frame the latents at its own step, the last and the next clean estimate.

    `steps_done[k]` counts the steps that chunk k has run, `finished` the frames handed on, `encoded` those taken from
    the source. A frame's level is the number of steps that all chunks covering it have run. `clean` keeps, by frame,
    the source's latents for a network that sees them at every step. `whole` is, by chunk, its input at its last
    whole step, as long as steps that reuse its deep features are to come: a resumed run computes these features again.
    """

    steps_done: list[int] = field(default_factory=list)
    finished: int = 0
    encoded: int = 0
    latents: dict[int, Tensor] = field(default_factory=dict)
    previous: dict[int, Tensor] = field(default_factory=dict)
    pending: dict[int, Tensor] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    whole: dict[int, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, for a file: those of frames and chunks one by one, as they are."""
        named = {"steps_done": torch.tensor(self.steps_done), "counts": torch.tensor([self.finished, self.encoded])}
        return named | {f"{name}.{at}": held for name in _HELD for at, held in getattr(self, name).items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: str = "cpu") -> "RefineState":
        """Rebuild a state from `tensors`, taking them out of there; older code wrote each kind in one piece."""
        for name in _HELD:
            if (numbers := tensors.pop(f"{name}.slots", None)) is not None:
                stacked = zip(numbers.tolist(), tensors.pop(name), strict=True)
                tensors |= {f"{name}.{number}": tensor for number, tensor in stacked}
        finished, encoded = tensors["counts"].tolist()
        state = cls(tensors["steps_done"].tolist(), finished, encoded)
        for key in [*tensors]:
            name, _, number = key.partition(".")
            if name in _HELD:
                getattr(state, name)[int(number)] = tensors.pop(key).to(device)
        return state


_HELD = ("latents", "previous", "pending", "clean", "whole")


def noise_grid(schedule: NoiseSchedule, settings: RefineConfig) -> tuple[Tensor, Tensor]:
    """Return timesteps and noise levels of its schedule. Raises ConfigError where the first leaves no picture."""
    to_end = settings.solver == "ddim"
    timesteps, rho = schedule.refining_grid(settings.noise_level, settings.num_inference_steps, to_end)
    if not torch.isfinite(rho[0]):
        raise ConfigError(f"refine.noise_level {settings.noise_level} leaves nothing of the video", "use a lower one")
    return timesteps, rho


class Refiner:
    """Runs the chunk-steps of a plan and yields latents of frames as soon as they are final."""

    def __init__(
        self,
        denoiser: Denoiser,
        plan: Sequence[Chunk],
        settings: RefineConfig,
        draws: Draws,
        encode: Encode,
        state: RefineState | None = None,
        observe: Callable[[Chunk, RefineState], None] = lambda chunk, state: None,
        around: Around | None = None,
    ) -> None:
        self.around = around
        self.denoiser, self.plan, self.settings, self.draws, self.encode = denoiser, plan, settings, draws, encode
        self.num_frames, self.observe = plan[-1].stop, observe
        self.state = state or RefineState(steps_done=[0] * len(plan))
        self.timesteps, self.rho = noise_grid(denoiser.schedule, settings)
        self.deep: dict[int, dict[int, Tensor]] = {}  # by chunk and row
        self.finite: Tensor | None = None  # whether all estimates so far are, on the device

    def run(self) -> Iterator[Tensor]:
        """Yield the final latents [n, C, h, w] of one group of frames after the other, in order.

        A group is what one chunk is the last to cover, so the groups do not depend on the order of the chunk-steps.
        """
        state = self.state
        while state.finished < self.num_frames:
            chunk = self._next_ready()
            if chunk is None:
                self._admit()
                continue
            self._run_step(chunk)
            self.observe(chunk, state)
            while (stop := self._final_stop()) > state.finished:
                group = range(state.finished, stop)
                final = torch.stack([state.latents[frame] for frame in group])
                for frame in group:
                    del state.latents[frame]
                    state.previous.pop(frame, None)
                    state.clean.pop(frame, None)
                state.finished = stop
                # Once a group, not once a step: that would wait for the device. A state is stored after a group.
                if self.finite is not None and not bool(self.finite):
                    raise NumericsError("the refiner produced NaN or Inf")
                yield final
                del final  # large, and the next chunk needs its place

    def _steps_done(self, frame: int) -> int:
        return min(self.state.steps_done[index] for index in covering(self.plan, frame))

    def _next_ready(self) -> Chunk | None:
        """Return the chunk to advance: always the leftmost that can, which makes the order diagonal."""
        return next(self._ready(), None)

    def _ready(self) -> Iterator[Chunk]:
        """Yield the chunks whose frames are all at the chunk's own level, from left to right."""
        first = covering(self.plan, self.state.finished)[0]
        for chunk in takewhile(lambda chunk: chunk.stop <= self.state.encoded, self.plan[first:]):
            done, frames = self.state.steps_done[chunk.index], range(chunk.start, chunk.stop)
            if done < len(self.timesteps) and all(self._steps_done(frame) == done for frame in frames):
                yield chunk

    def _admit(self) -> None:
        """Take in the new frames of the next chunk: encode them and add noise up to the start level."""
        state, places = self.state, list[Tensor]()
        new = range(state.encoded, self.plan[covering(self.plan, state.encoded)[0]].stop)
        for frame in new:
            clean = self.encode(frame)
            # One by one, as a part would keep all of them in memory, but side by side: else what encoding takes and
            # frees again would lie between them, and be too small for anything.
            places = places or [torch.empty_like(clean) for _ in new for _ in range(1 + self.denoiser.sees_source)]
            state.latents[frame] = places.pop().copy_(self._start(clean, self._noise("refine.start", (frame,), clean)))
            if self.denoiser.sees_source:
                state.clean[frame] = places.pop().copy_(clean)
        state.encoded = new.stop

    def _noise(self, purpose: str, address: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw unit normals like a tensor for a frame, the first number of the address, and send them to its device."""
        frame, *rest = address
        where = (frame if self.around is None else self.around.frame(frame), *rest)
        return send(self.draws.normal(purpose, where, like.shape), like.device).to(like.dtype)

    def _start(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Noise clean latents to the start level t' - 1, in variance-exploding coordinates x_t / alpha_t.

        The published code multiplies by rho where it should divide by alpha, so its network first sees an input sigma
        times as large as in training.
        """
        schedule, level = self.denoiser.schedule, self.settings.noise_level - 1
        noisy = schedule.add_noise(clean, noise, level)
        return noisy * self.rho[0] if self.settings.start_scale == "published" else noisy / schedule.alphas[level]

    @torch.inference_mode()
    def _run_step(self, chunk: Chunk) -> None:
        step = self.state.steps_done[chunk.index]
        frames = range(chunk.start, chunk.stop)
        estimate = self._chunk_estimate(chunk, step)

        def draw_cut(low: int, high: int, index: int) -> int:
            where = index if self.around is None else self.around.chunk(index)
            return self.draws.integer("refine.cut", (where, step), max(low, self.denoiser.first_cut), high)

        for frame in blend.owned(self.plan, chunk.index, draw_cut, self.settings.cut_range):
            self.state.pending[frame] = estimate[frame - chunk.start]
        self.state.steps_done[chunk.index] += 1
        for frame in frames:
            if self._steps_done(frame) > step:
                self._advance(frame, step)
            elif frame in self.state.pending:  # a copy: a part would keep all of the estimate in memory
                self.state.pending[frame] = self.state.pending[frame].clone()

    def _chunk_estimate(self, chunk: Chunk, step: int) -> Tensor:
        """Return the clean estimate [F, C, h, w] of a chunk, with its deep features of the last whole step."""
        interval, whole, index = self.settings.reuse_interval, self.state.whole, chunk.index
        clean = self.state.clean  # as it is kept: a clip of its own would be a tenth of all memory
        source = [clean[frame] for frame in range(chunk.start, chunk.stop)] if self.denoiser.sees_source else None
        predictor = partial(self.denoiser.predictor, chunk, source)
        if interval == 1:
            return self._clean_estimate(predictor(), self._input(chunk, step), step)
        since, kept = step % interval, self.deep.pop(index, {})
        if since and not kept:
            self._clean_estimate(predictor(kept), whole[index], step - since)
        latents = self._input(chunk, step)
        estimate = self._clean_estimate(predictor(kept, since > 0), latents, step)
        if since + 1 < interval and step + 1 < len(self.timesteps):
            self.deep[index] = kept
            whole.setdefault(index, latents)
        else:
            whole.pop(index, None)
        return estimate

    def _input(self, chunk: Chunk, step: int) -> Tensor:
        """Return what the network sees of a chunk: its latents [F, C, h, w] at their level, of unit variance."""
        scale = self.denoiser.schedule.input_scale(self.rho[step])
        # Scaled one by one: a second clip of full size would be a tenth of all memory.
        return torch.stack([self.state.latents[frame] / scale for frame in range(chunk.start, chunk.stop)])

    def _clean_estimate(self, predict: Predict, latents: Tensor, step: int) -> Tensor:
        """Predict the clean latents of one chunk from its input: [F, C, h, w] -> [F, C, h, w]."""
        scaled = latents.transpose(0, 1).unsqueeze(0)  # [1, C, F, h, w]
        timestep: Any = self.timesteps[step].item()
        schedule = self.denoiser.schedule
        total = schedule.config.num_train_timesteps
        output = guided(predict, scaled, timestep, self.settings, total, self.denoiser.batched)
        x0 = schedule.to_x0(output, scaled, timestep)
        finite = torch.isfinite(torch.stack(x0.aminmax())).all()  # NaN is both; no mask as large as the clip
        self.finite = finite if self.finite is None else self.finite & finite
        return x0[0].transpose(0, 1)

    def _advance(self, frame: int, step: int) -> None:
        """Bring one frame to the next noise level with its blended clean estimate."""
        state, clean = self.state, self.state.pending.pop(frame)
        fresh = self.settings.stochastic and self.rho[step + 1] > 0
        noise = self._noise("refine.step", (frame, step), clean) if fresh else None
        state.latents[frame] = solvers.dpmpp_2m_step(
            state.latents[frame], clean, state.previous.get(frame), self.rho, step, noise
        )
        # Without an estimate before it, the step is DDIM's, with eta 1 where noise is fresh, else 0.
        if self.settings.solver == "dpmpp":
            state.previous[frame] = clean

    def _final_stop(self) -> int:
        """Return the end of the next group of frames when all of it is final, else the frames finished so far."""
        finished = self.state.finished
        if finished == self.num_frames:
            return finished
        last = max(covering(self.plan, finished))
        stop = self.plan[last + 1].start if last + 1 < len(self.plan) else self.num_frames
        complete = all(self._steps_done(frame) == len(self.timesteps) for frame in range(finished, stop))
        return stop if complete else finished
