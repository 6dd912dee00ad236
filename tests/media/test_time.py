"""Frames have times: rates survive as exact fractions, uneven pictures come when they are due, sound stays with them.

Reported for other tools as k4yt3x/video2x#1360, n00mkrad/flowframes#43, #259 and #343, gpac/gpac#2283,
WhatDreamsCost/WhatDreamsCost-ComfyUI#122. All inputs are made here.
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt2v import config
from streamt2v.jobs.recipe import inspect_source
from streamt2v.media import clock, isolated, reading, writing
from tests.cli.helpers import TINY, call, made
from tests.media.makers import FLASHES, X264, beep_times, ffmpeg, flash_times, flashing, gaps, rate_of, refine

RATES = st.builds(Fraction, st.integers(1, 2**30), st.integers(1, 2**20)).filter(lambda rate: 0.01 <= rate <= 1000)

# ------------------------------------------------------------------------------------------------------------- rates


@given(RATES)
def test_a_rate_comes_back_from_the_float_that_a_recipe_holds(rate: Fraction) -> None:
    assert config.exact_rate(float(rate)) == rate
    assert config.exact_rate(json.loads(json.dumps(float(rate)))) == rate


@pytest.mark.parametrize("fps", ["2250000/75671", "1107000/36929", "59.9401", "23.976", "349525/1048576", "999.9999"])
def test_a_rate_survives_to_the_file(fps: str, tmp_path: Path) -> None:
    rate = config.exact_rate(Fraction(fps))
    writer = writing.SegmentWriter(tmp_path / "run.mp4", 16, 16, rate)
    for count in (3, 4, 1):
        writer.append(np.zeros((count, 16, 16, 3), np.uint8))
    assert writer.finish(tmp_path / "out.mp4").fps == reading.probe(tmp_path / "out.mp4").fps == rate


def phone(path: Path, rate: Fraction) -> Path:
    """Write a clip whose average rate is an odd fraction, as of a phone, with as many ticks a frame as it needs."""
    growing = path.with_suffix(".growing")
    writer = writing.SegmentWriter(growing, 36, 64, rate)
    writer.append(np.random.default_rng(0).integers(0, 255, (25, 36, 64, 3), dtype=np.uint8))
    writer.finish(path)
    return path


@pytest.mark.parametrize(
    ("source", "asked", "rate"),
    [
        ("2250000/75671", [], "2250000/75671"),
        ("1107000/36929", [], "1107000/36929"),
        ("25", ["--fps", "59.9401"], "599401/10000"),
        ("25", ["--fps", "30000/1001"], "30000/1001"),
        ("24000/1001", ["--set", "output.fps=1107000/36929"], "1107000/36929"),
    ],
)
def test_what_was_just_written_is_whole(
    source: str, asked: list[str], rate: str, tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]
) -> None:
    given, out = phone(tmp_path / "in.mp4", Fraction(source)), tmp_path / "out.mp4"
    assert refine(given, out, *asked) == 0
    assert rate_of(out) == Fraction(rate)
    assert call("verify", out) == call("resume", out, "-q") == 0
    assert call("rerun", out, "--source", given, "-o", tmp_path / "again.mp4", "-q") == 0
    assert rate_of(tmp_path / "again.mp4") == Fraction(rate)
    assert refine(out, tmp_path / "twice.mp4") == 0
    assert rate_of(tmp_path / "twice.mp4") == Fraction(rate)


def test_extend_keeps_an_odd_rate(tmp_path: Path) -> None:
    given, out = phone(tmp_path / "in.mp4", Fraction(1107000, 36929)), tmp_path / "out.mp4"
    assert call("extend", given, "-o", out, "--frames", 27, "--prompt", "a red ball", "--no-refine", *TINY) == 0
    assert rate_of(out) == Fraction(1107000, 36929)
    assert call("verify", out) == 0


@pytest.mark.parametrize("text", ["0", "x", "1/0", "-3", "1e9", "30000/", ""])
def test_what_is_no_rate_is_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "a red ball", "--fps", text) == 2
    assert "fps" in capsys.readouterr().err


def test_a_recipe_with_another_rate_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for fps in (7.9, "8", None, [8]):
        comment = json.dumps({"streamt2v": "1", "config": {"num_frames": 3, "output.fps": fps}})
        assert call("verify", made(tmp_path / "in.mp4", 3, comment)) == 3
        assert "3 frames at 8 fps" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the clock


@given(RATES, st.integers(1, 60), st.integers(0, 10**6), st.data())
def test_even_pictures_keep_their_rate_and_have_a_frame_each(
    rate: Fraction, count: int, start: int, data: st.DataObject
) -> None:
    base = 1 / (rate * 1000)
    off = data.draw(st.lists(st.integers(-240, 240), min_size=count, max_size=count))
    times = [start + 1000 * index + off[index] for index in range(count)]
    found = clock.measure(times, base, [rate])
    assert (found.rate, found.frames, found.steady, found.pictures) == (rate, count, True, count)
    assert [found.place(time * base) for time in times] == list(range(count))


@settings(deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=40), st.sampled_from([25, 30, 50]), st.integers(0, 400))
def test_every_frame_shows_what_a_player_shows_then(times: list[int], announced: int, hold: int) -> None:
    times = sorted(times)
    base = Fraction(1, 1000)
    found = clock.measure(times, base, [Fraction(announced)], hold)
    assert found.frames <= 8 * len(times) + 1
    shown = list(clock.placed([(time * base, index) for index, time in enumerate(times)], found))
    assert [first for _, first, _ in shown] == [sum(count for *_, count in shown[:k]) for k in range(len(shown))]
    frames = [index for index, _, count in shown for _ in range(count)]
    assert len(frames) == found.frames
    for number, index in enumerate(frames):
        due = [k for k, time in enumerate(times) if found.place(time * base) <= number]
        assert index == max(due)
        # The time of the frame is that of what it shows, or later by what nothing new was shown.
        assert found.start + (number + Fraction(1, 2)) / found.rate >= times[index] * base


@given(st.lists(st.one_of(st.none(), st.integers(-(10**6), 10**6)), min_size=1, max_size=60), st.integers(1, 500))
def test_straightened_times_stay_near_and_never_run_away(times: list[int | None], step: int) -> None:
    straight = clock.Straightened(step, 1000 * step)
    made = [straight.add(time) for time in times]
    highest = [max(made[: index + 1]) for index in range(len(made))]
    assert all(time > high - 25 * step - 1 for time, high in zip(made, highest, strict=True))
    assert all(now - before <= 1000 * step for before, now in itertools.pairwise(highest))


def test_known_clocks() -> None:
    ms = Fraction(1, 1000)
    ntsc = [round(index * 1001 / 30) for index in range(300)]
    assert clock.measure(ntsc, ms, [Fraction(30000, 1001)]).steady
    assert clock.measure(ntsc, ms, []).rate == Fraction(30000, 1001)  # nobody says it
    assert clock.measure(ntsc, ms, [Fraction(1000)]).rate == Fraction(30000, 1001)  # what WebM announces
    gaps = [0, 40, 80, 200, 240]  # two were dropped
    assert clock.measure(gaps, ms, [Fraction(25)]) == clock.Clock(Fraction(), Fraction(25), 7, 5, False)
    slides = clock.measure([0, 5000, 9000], ms, [])
    assert slides.frames <= 13 and not math.isinf(slides.rate)
    assert clock.measure([0, 5000, 9000], ms, [], hold=9000).frames > slides.frames  # the last one stays on, too


# ------------------------------------------------------------------------------------------------- sound and picture


def late(name: str, picture: float = 0, sound: float = 0, *more: str) -> list[object]:
    """Arguments that copy a clip with picture or sound later by some seconds."""
    return [
        "-itsoffset", picture, "-i", name, "-itsoffset", sound, "-i", name, "-map", "0:v", "-map", "1:a", "-c", "copy",
        *more,
    ]  # fmt: skip


SLOW = "gte(n,0)*if(lt(n,50),1,not(mod(n,5)))"
PAUSE = "not(between(t,1.3,1.9))"
STRUCTURES = {
    "even.mp4": ("", [], []),
    "picture_late.mp4": ("", [], late("{}", 0.6)),
    "picture_late.mkv": ("", [], late("{}", 0.6)),
    "picture_late.ts": ("", [], late("{}", 0.6)),
    "sound_late.mp4": ("", [], late("{}", 0, 0.7)),
    "sound_late.mkv": ("", [], late("{}", 0, 0.7)),
    "both_late.mp4": ("", [], late("{}", 5.2, 4.9)),
    "before_0.mp4": ("", [], ["-i", "{}", "-c", "copy", "-output_ts_offset", "-0.5", "-avoid_negative_ts", "disabled"]),
    "cut.mp4": ("", [], ["-ss", "0.5", "-i", "{}", "-c", "copy"]),
    "fast_then_slow.mp4": (SLOW, ["50"], []),
    "fast_then_slow.mkv": (SLOW, ["50"], []),
    "pause.mp4": (PAUSE, ["25"], []),
    "pause.mkv": (PAUSE, ["25"], []),
    "pause.avi": (PAUSE, ["25"], []),
    "every_third_lost.flv": ("mod(n,3)", ["30"], []),
    "ntsc.ts": ("", ["30000/1001"], []),
    "few.mp4": ("not(mod(n,10))+eq(n,51)", ["50"], []),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_sound_and_picture_stay_together(name: str, tmp_path: Path, unrefined: None) -> None:
    select, rate, copied = STRUCTURES[name]
    plain, source, out = tmp_path / f"plain{Path(name).suffix}", tmp_path / name, tmp_path / "out.mp4"
    codecs = [*X264, "-c:a", "libmp3lame" if source.suffix in (".avi", ".flv") else "aac"]
    flashing(plain if copied else source, *codecs, rate=(rate or ["25"])[0], select=select or "1")
    if copied:
        ffmpeg(*(plain if part == "{}" else part for part in copied), source)
    assert refine(source, out) == 0
    found = isolated.probe(out)
    due, shown = np.array(flash_times(source)), np.array(flash_times(out))
    apart, again = np.array(beep_times(source)) - due, np.array(beep_times(out)) - shown
    assert len(again) == len(apart) > 0
    assert np.abs(again - apart).max() < 1 / float(found.fps) + 0.005
    assert gaps([shown[-1] - shown[0]], [due[-1] - due[0]])[0] < 1.5 / float(found.fps)
    assert found.frames == isolated.probe(source).frames
    assert call("verify", out) == 0


@pytest.mark.parametrize(("codec", "bf"), [("libx264", 3), ("mpeg4", 2), ("mpeg4", 0)])
def test_pictures_of_an_avi_are_as_late_as_its_sound(codec: str, bf: int, tmp_path: Path, unrefined: None) -> None:
    """The order that B-frames are stored in delays nothing."""
    codecs = ["-c:v", codec, "-pix_fmt", "yuv420p", "-bf", str(bf), "-c:a", "pcm_s16le"]
    source, out = flashing(tmp_path / "in.avi", *codecs), tmp_path / "out.mp4"
    assert isolated.probe(source).clock.start == 0
    assert refine(source, out) == 0
    assert max(gaps(flash_times(source), FLASHES)) < 0.001
    assert max(gaps(flash_times(out), FLASHES)) < 0.001
    assert max(gaps(beep_times(out), FLASHES)) < 0.025


def test_recordings_that_were_joined_are_one(tmp_path: Path, unrefined: None) -> None:
    part, source, out = tmp_path / "part.ts", tmp_path / "in.ts", tmp_path / "out.mp4"
    flashing(part, *X264, "-c:a", "aac", "-muxdelay", "0")
    source.write_bytes(part.read_bytes() * 2)
    assert isolated.probe(source).frames == 2 * isolated.probe(part).frames
    assert refine(source, out) == 0
    shown, heard = flash_times(out), beep_times(out)
    assert len(shown) == len(heard) == 4
    assert max(gaps(shown, heard)) < 0.05
    assert inspect_source(source).clock.joined


def test_uneven_times_are_said(tmp_path: Path, unrefined: None, capsys: pytest.CaptureFixture[str]) -> None:
    source = flashing(tmp_path / "in.mp4", *X264, "-c:a", "aac", rate="50", select=SLOW)
    assert refine(source, tmp_path / "out.mp4", quiet=False) == 0
    assert "come at uneven times: 146 frames at 50 fps" in capsys.readouterr().err
