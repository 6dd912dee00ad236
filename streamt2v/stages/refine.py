"""Stage 3, refinement: SDEdit in overlapping chunks with randomized blending, for any length at constant memory.

Every denoising step blends the chunks anew (arXiv 2403.14773 section 4.3): in an overlap a random cut decides up to
which frame the left chunk's clean estimate is used. Step s of a chunk needs only step s-1 of the chunks that share
frames with it. So the stage need not sweep over the whole video once a step: chunk k runs step s as soon as chunk k+1
has run step s-1, and a window of about as many chunks as there are steps slides along the video (diagonal order). A
chunk-step is a function of the latents at its level and of addressed draws, so both orders give the same numbers. Where
the deep layers are computed at every nth step only, it is one of the chunk's latents at its last whole step, too.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, takewhile

import torch
from torch import Tensor

from streamt2v.chunks import Chunk, covering
from streamt2v.config import Blending, RefineConfig
from streamt2v.devices import send
from streamt2v.diffusion import blend, guidance, solvers
from streamt2v.diffusion.noise import Draws
from streamt2v.diffusion.schedules import NoiseSchedule, sdedit_grid
from streamt2v.errors import ConfigError, NumericsError
from streamt2v.models.unet3d import Conditioning
from streamt2v.stages.denoise import CONDITIONAL, Predict, both_branches, reusing

Encode = Callable[[int, int], Tensor]
"""(start, stop) -> clean latents [F, C, h, w] of these frames of the source; asked once for every frame, in order."""


@dataclass(frozen=True)
class Denoiser:
    """The refiner network's `run` (or what was compiled from it), its schedule and the text of every chunk.

    `run` takes latents, timestep, text, None for CAM, features of the deep layers or None and, where the network
    `sees_source`, the source's clean latents; it returns its prediction and its features. `batched` as in
    `denoise.Sampling`; `place` is where features wait while other chunks have their turn, None: where they are made.
    """

    run: Callable[..., tuple[Tensor, Tensor]]
    schedule: NoiseSchedule
    text: Callable[[Chunk], Conditioning]
    batched: bool = True
    place: str | None = None
    sees_source: bool = False

    def predictor(
        self, chunk: Chunk, source: Tensor | None, kept: dict[int, Tensor] | None = None, reuses: bool = False
    ) -> Predict:
        """Return the network with the text and the source's latents [1, C, F, h, w] of a chunk, if it sees them.

        Its deep features are taken from `kept`, or kept there.
        """
        text = self.text(chunk)

        def run(latents: Tensor, timestep: int, rows: slice, deep: Tensor | None) -> tuple[Tensor, Tensor]:
            # A number in a tensor, as compiled code would be made anew for every other number.
            time = torch.full((1,), timestep, device=latents.device)
            beside = () if source is None else (source,)
            return self.run(latents, time, text.rows(rows), None, deep, *beside)

        return reusing(run, kept, lambda _: reuses, self.place)


@dataclass
class RefineState:
    """Everything in flight: per slot the latents at its own step, the last and the next clean estimate.

    A slot is a frame of the video; without blending between chunks it is a frame of one chunk. `steps_done[k]` counts
    the steps that chunk k has run, `finished` the slots handed on, `encoded` the frames taken from the source. A
    slot's level is the number of steps that all chunks covering it have run. `clean` keeps, by frame, the source's
    latents that a later chunk without blending starts from again, or that the network is to see again. `whole` are a
    chunk's latents at its last whole step, while steps that reuse its deep features are to come: a run that goes on
    makes these features from them again.
    """

    steps_done: list[int] = field(default_factory=list)
    finished: int = 0
    encoded: int = 0
    latents: dict[int, Tensor] = field(default_factory=dict)
    previous: dict[int, Tensor] = field(default_factory=dict)
    pending: dict[int, Tensor] = field(default_factory=dict)
    clean: dict[int, Tensor] = field(default_factory=dict)
    whole: dict[int, Tensor] = field(default_factory=dict)

    @property
    def admitted(self) -> int:
        """Slots filled so far."""
        return max(self.latents, default=self.finished - 1) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the state as named tensors, for a file."""
        named = {"steps_done": torch.tensor(self.steps_done), "counts": torch.tensor([self.finished, self.encoded])}
        for name in _STACKS:
            values: dict[int, Tensor] = getattr(self, name)
            if values:
                named[name] = torch.stack(list(values.values()))
                named[f"{name}.slots"] = torch.tensor(list(values))
        return named

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], device: str = "cpu") -> "RefineState":
        """Rebuild a state from `tensors`."""
        stacks = {
            name: dict(zip(tensors[f"{name}.slots"].tolist(), tensors[name].to(device), strict=True))
            for name in _STACKS
            if name in tensors
        }
        finished, encoded = tensors["counts"].tolist()
        return cls(tensors["steps_done"].tolist(), finished, encoded, **stacks)


_STACKS = ("latents", "previous", "pending", "clean", "whole")


def noise_grid(schedule: NoiseSchedule, settings: RefineConfig) -> tuple[Tensor, Tensor]:
    """Return timesteps and noise levels (see `sdedit_grid`). Raises ConfigError where the first leaves no picture."""
    timesteps, rho = sdedit_grid(schedule, settings.noise_level, settings.num_inference_steps)
    if not torch.isfinite(rho[0]):
        raise ConfigError(f"refine.noise_level {settings.noise_level} leaves nothing of the video", "use a lower one")
    return timesteps, rho


def _slots(plan: Sequence[Chunk], blending: Blending) -> tuple[tuple[Chunk, ...], list[int]]:
    """Return the chunks in slots, and the frame of every slot.

    With randomized blending a slot is a frame. Without blending every chunk has slots of its own.
    """
    if blending == "randomized":
        return tuple(plan), list(range(plan[-1].stop))
    frames = [frame for chunk in plan for frame in range(chunk.start, chunk.stop)]
    ends = list(accumulate(chunk.size for chunk in plan))
    apart = (Chunk(chunk.index, end - chunk.size, end, end - chunk.size) for chunk, end in zip(plan, ends, strict=True))
    return tuple(apart), frames


class Refiner:
    """Runs the chunk-steps of a plan and yields latents of frames as soon as they are final."""

    def __init__(
        self, denoiser: Denoiser, plan: Sequence[Chunk], settings: RefineConfig, draws: Draws, encode: Encode,
        state: RefineState | None = None,
    ) -> None:  # fmt: skip
        self.denoiser, self.settings, self.draws, self.encode = denoiser, settings, draws, encode
        self.source_plan = plan
        self.plan, self.frames = _slots(plan, settings.blending)
        self.state = state or RefineState(steps_done=[0] * len(plan))
        self.timesteps, self.rho = noise_grid(denoiser.schedule, settings)
        self.deep: dict[int, dict[int, Tensor]] = {}  # by chunk and row
        self.finite: Tensor | None = None  # whether all estimates so far are, on the device

    def run(self) -> Iterator[Tensor]:
        """Yield the final latents [n, C, h, w] of one group of frames after the other, in order.

        A group is what one chunk is the last to cover, so the groups do not depend on the order of the chunk-steps.
        """
        state = self.state
        while state.finished < len(self.frames):
            chunk = self._next_ready()
            if chunk is None:
                self._admit()
                continue
            self._run_step(chunk)
            while (stop := self._final_stop()) > state.finished:
                slots = range(state.finished, stop)
                shown = torch.stack([state.latents[slot] for slot in slots if self._is_shown(slot)])
                for slot in slots:  # what is left of a chunk's estimate goes with them
                    del state.latents[slot], state.previous[slot]
                state.finished = stop
                # Once a group, not once a step: that would wait for the device. A state is stored after a group.
                if self.finite is not None and not bool(self.finite):
                    raise NumericsError("the refiner produced NaN or Inf")
                self._forget(stop)
                yield shown

    def _is_shown(self, slot: int) -> bool:
        """Tell whether the output takes a slot: without blending, the frames a chunk adds."""
        last = max(covering(self.plan, slot))
        return self.settings.blending == "randomized" or self.frames[slot] >= self.source_plan[last].new_start

    def _steps_done(self, slot: int) -> int:
        return min(self.state.steps_done[index] for index in covering(self.plan, slot))

    def _next_ready(self) -> Chunk | None:
        """Return the chunk to advance: the leftmost that can (diagonal), or the least advanced one (sweep)."""
        admitted, done = self.state.admitted, self.state.steps_done
        if self.settings.order == "sweep" and admitted < len(self.frames):
            return None
        first = covering(self.plan, self.state.finished)[0]
        started = takewhile(lambda chunk: chunk.stop <= admitted, self.plan[first:])
        ready = (
            chunk
            for chunk in started
            if done[chunk.index] < len(self.timesteps)
            and all(self._steps_done(slot) == done[chunk.index] for slot in range(chunk.start, chunk.stop))
        )
        if self.settings.order == "sweep":
            return min(ready, key=lambda chunk: (done[chunk.index], chunk.index), default=None)
        return next(ready, None)

    def _admit(self) -> None:
        """Take in the frames of the next chunk: encode, noise to the start level."""
        state, start = self.state, self.state.admitted
        chunk = self.plan[covering(self.plan, start)[0]]
        last_frame = self.frames[chunk.stop - 1]
        if state.encoded <= last_frame:
            new = range(state.encoded, last_frame + 1)
            state.clean.update(zip(new, self.encode(new.start, new.stop), strict=True))
            state.encoded = new.stop
        for slot in range(start, chunk.stop):
            clean = state.clean[self.frames[slot]]
            noise = self._noise("refine.start", self._address(slot), clean)
            state.latents[slot] = self._start(clean, noise)
        self._forget(start)

    def _forget(self, slot: int) -> None:
        """Let go of the source's latents that neither this slot's chunk nor a later one needs."""
        state, wanted = self.state, self.denoiser.sees_source or self.settings.blending != "randomized"
        # A network that sees the source does so until a chunk is done; else it is needed where chunks start anew.
        slot = state.finished if self.denoiser.sees_source else slot
        first = self.frames[slot] if wanted and slot < len(self.frames) else len(self.frames)
        state.clean = {frame: latents for frame, latents in state.clean.items() if frame >= first}

    def _address(self, slot: int) -> tuple[int, ...]:
        """Return where a slot's noise is drawn: by frame, so that chunks share it, or apart for independent chunks."""
        return (-1, slot) if self.settings.blending == "independent" else (self.frames[slot],)

    def _noise(self, purpose: str, address: tuple[int, ...], like: Tensor) -> Tensor:
        """Draw unit normals like a tensor, and send them to its device."""
        return send(self.draws.normal(purpose, address, like.shape), like.device).to(like.dtype)

    def _start(self, clean: Tensor, noise: Tensor) -> Tensor:
        """Noise clean latents to the start level t' - 1, in variance-exploding coordinates x_t / alpha_t.

        The published code multiplies by rho where it should divide by alpha, so that its network first sees an input
        sigma times as large as in training.
        """
        schedule, level = self.denoiser.schedule, self.settings.noise_level - 1
        noisy = schedule.add_noise(clean, noise, level)
        return noisy * self.rho[0] if self.settings.start_scale == "published" else noisy / schedule.alphas[level]

    @torch.inference_mode()
    def _run_step(self, chunk: Chunk) -> None:
        step = self.state.steps_done[chunk.index]
        slots = range(chunk.start, chunk.stop)
        estimate = self._chunk_estimate(chunk.index, torch.stack([self.state.latents[slot] for slot in slots]), step)

        def draw_cut(low: int, high: int, index: int) -> int:
            return self.draws.integer("refine.cut", (index, step), low, high)

        for slot in blend.owned(self.plan, chunk.index, draw_cut, self.settings.cut_range):
            self.state.pending[slot] = estimate[slot - chunk.start]
        self.state.steps_done[chunk.index] += 1
        for slot in slots:
            if self._steps_done(slot) > step:
                self._advance(slot, step)
            elif slot in self.state.pending:  # a copy: a part would keep all of the estimate in memory
                self.state.pending[slot] = self.state.pending[slot].clone()

    def _chunk_estimate(self, index: int, latents: Tensor, step: int) -> Tensor:
        """Return the clean estimate of a chunk's latents, with its deep features of the last whole step."""
        interval, whole = self.settings.reuse_interval, self.state.whole
        predictor = partial(self.denoiser.predictor, self.source_plan[index], self._source(index))
        if interval == 1:
            return self._clean_estimate(predictor(), latents, step)
        since, kept = step % interval, self.deep.pop(index, {})
        if since and not kept:
            self._clean_estimate(predictor(kept), whole[index], step - since)
        estimate = self._clean_estimate(predictor(kept, since > 0), latents, step)
        if since + 1 < interval and step + 1 < len(self.timesteps):
            self.deep[index] = kept
            whole.setdefault(index, latents)
        else:
            whole.pop(index, None)
        return estimate

    def _source(self, index: int) -> Tensor | None:
        """Return the source's latents of a chunk [1, C, F, h, w] for a network that sees them."""
        if not self.denoiser.sees_source:
            return None
        chunk = self.source_plan[index]
        frames = [self.state.clean[frame] for frame in range(chunk.start, chunk.stop)]
        return torch.stack(frames).transpose(0, 1).unsqueeze(0)

    def _clean_estimate(self, predict: Predict, latents: Tensor, step: int) -> Tensor:
        """Predict the clean latents of one chunk: [F, C, h, w] -> [F, C, h, w]."""
        scaled = latents.transpose(0, 1).unsqueeze(0) / (self.rho[step] ** 2 + 1) ** 0.5  # [1, C, F, h, w]
        timestep = int(self.timesteps[step])
        scale = self.settings.guidance_scale
        stop = self.settings.guidance_stop * self.denoiser.schedule.config.num_train_timesteps
        if scale == 1.0 or timestep < stop:
            output = predict(scaled, timestep, CONDITIONAL)
        else:
            unconditional, conditional = both_branches(predict, scaled, timestep, self.denoiser.batched)
            output = guidance.combine(unconditional, conditional, scale, self.settings.guidance_rescale)
        x0 = self.denoiser.schedule.to_x0(output, scaled, timestep)
        finite = torch.isfinite(x0).all()
        self.finite = finite if self.finite is None else self.finite & finite
        return x0[0].transpose(0, 1)

    def _advance(self, slot: int, step: int) -> None:
        """Bring one frame to the next noise level with its blended clean estimate."""
        clean = self.state.pending.pop(slot)
        stochastic = self.settings.stochastic and self.rho[step + 1] > 0
        noise = None
        if stochastic:
            noise = self._noise("refine.step", (*self._address(slot), step), clean)
        self.state.latents[slot] = solvers.dpmpp_2m_step(
            self.state.latents[slot], clean, self.state.previous.get(slot), self.rho, step, noise
        )
        self.state.previous[slot] = clean

    def _final_stop(self) -> int:
        """Return the end of the next group of slots when all of it is final, else the slots finished so far."""
        finished = self.state.finished
        if finished == len(self.frames):
            return finished
        last = max(covering(self.plan, finished))
        group = [slot for slot in range(finished, self.plan[last].stop) if max(covering(self.plan, slot)) == last]
        complete = all(self._steps_done(slot) == len(self.timesteps) for slot in group)
        return group[-1] + 1 if complete else finished
