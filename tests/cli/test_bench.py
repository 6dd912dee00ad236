"""`bench` and `plan`: what a short run measures foretells a long one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from streamt2v import devices, weights
from streamt2v.families import networks, streamingt2v
from streamt2v.jobs import forecast
from streamt2v.runs import pipeline, watch
from streamt2v.stages import refine, stream
from tests.cli.helpers import PROMPT, TINY, call, generate, result, start

PLANNED = [word for word in TINY if word != "--quiet"]
TIMED = [word for word in TINY if word not in ("--seed", "7")]


class SlowMachine:
    """A clock that only work moves, so many seconds for each call of a function.

    What is written beside the work of other threads takes none of it.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.patch = 0.0, patch
        for module in (pipeline, networks, watch, devices):
            patch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now))

    def takes(self, owner: Any, name: str, seconds: float) -> None:
        done = getattr(owner, name)

        def slowly(*arguments: Any, **more: Any) -> Any:
            self.now += seconds
            return done(*arguments, **more)

        self.patch.setattr(owner, name, slowly)


def test_a_short_run_foretells_a_long_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path))
    machine = SlowMachine(monkeypatch)
    machine.takes(weights, "load", 5)
    machine.takes(streamingt2v, "from_text", 20)
    machine.takes(stream.Streamer, "chunk_latents", 7)
    machine.takes(refine.Refiner, "_run_step", 3)
    machine.takes(streamingt2v, "encode_frames", 0.25)
    machine.takes(streamingt2v, "decode_latents", 0.5)

    assert call("plan", PROMPT, *PLANNED, "--frames", 72) == 0
    assert "`streamt2v bench` measures it" in capsys.readouterr().out
    assert call("bench", *TIMED, "--frames", 72, "--json") == 0
    told = result(capsys)
    assert told["measured"]["stream_seconds_per_chunk"] == 7
    assert told["measured"]["refine_seconds_per_chunk"] == 2 * 3
    assert list(tmp_path.glob("*.mp4")) == []

    began = machine.now
    assert generate(tmp_path / "long.mp4", 72) == 0
    assert told["seconds"] == pytest.approx(machine.now - began, rel=0.02)
    capsys.readouterr()
    assert call("plan", PROMPT, *PLANNED, "--frames", 72, "--json") == 0
    assert json.loads(capsys.readouterr().out)["seconds"] == pytest.approx(machine.now - began, rel=0.02)


def test_what_is_not_refined_has_no_time_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path))
    arranged: list[tuple[str, str]] = []
    monkeypatch.setattr(
        devices, "arrange", lambda network, device: arranged.append((type(network).__name__, device.kind))
    )
    assert call("bench", *TIMED, "--no-refine", "--frames", 100) == 0
    (row,) = json.loads((tmp_path / "timings.json").read_text()).values()
    assert row["refine_seconds_per_chunk"] == 0
    assert set(row) == set(forecast.MEASURED)
    assert all(row[name] > 0 for name in forecast.MEASURED if name != "refine_seconds_per_chunk")
    assert {("UNet3D", "cpu"), ("AutoencoderKL", "cpu")} <= set(arranged)  # every network of a run


@pytest.mark.parametrize(
    "unused", ["--seed=7", "--negative=grey", "--at=16=a blue ball", "--timeline=turns.toml", "--loop"]
)
def test_it_takes_only_what_costs_time(unused: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("bench", *TIMED, unused) == 2
    assert unused.partition("=")[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_does_not_grow_with_the_length(tmp_path: Path) -> None:
    """Ten times the frames, each run in a process of its own: within 5 % of the peak."""
    peaks = []
    for frames in (240, 2400):
        command = ["generate", PROMPT, "--frames", frames, "-o", tmp_path / f"{frames}.mp4", *TINY, "--json"]
        said, _ = start(*command).communicate()
        peaks.append(json.loads(said.splitlines()[-1])["peak_memory_mb"])
    print(f"240 frames: {peaks[0]} MB, 2400 frames: {peaks[1]} MB")
    assert peaks[1] < 1.05 * peaks[0]
