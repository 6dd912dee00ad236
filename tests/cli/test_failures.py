"""What can go wrong in a run, at every stage: the right exit code and sentence, nothing bad stored, nothing lost."""

import contextlib
import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from streamt2v import files
from streamt2v.errors import HungUp, Terminated
from streamt2v.jobs import run_directory
from streamt2v.media import ffmpeg, lossless
from streamt2v.weights import networks
from tests import crash
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, result

SCRIPT_ENDS = {
    "before it writes": ("exit 1", "code 1"),
    "in the header": ('head -c 300 /dev/zero > "${last#file:}"; kill -9 $$', "code -9"),
    "half way": (
        '"$FFMPEG" "$@"; f="${last#file:}"; truncate -s $(($(stat -c %s "$f") / 2)) "$f"; kill -9 $$',
        "code -9",
    ),
    "half way, saying nothing": (
        '"$FFMPEG" "$@"; f="${last#file:}"; truncate -s $(($(stat -c %s "$f") / 2)) "$f"',
        "could not be written whole",
    ),
    "after the last byte": ('"$FFMPEG" "$@"; kill -9 $$', "code -9"),
    "hung at once": ("sleep 600", "made no progress"),
    "hung half way": ('head -c 5000 /dev/zero > "${last#file:}"; kill -STOP $$', "made no progress"),
}
# As small as the base video: what is refined is soon made again.
COMMAND = ["generate", PROMPT, "--frames", 40, *TINY, "--steps", "3", "--refine-steps", "3", "--size", "40x24"]
SHORT = ["generate", PROMPT, "--frames", 24, *TINY, "--size", "40x24"]
LARGE = [*COMMAND, "--size", "80x48"]
LOUD = [argument for argument in COMMAND if argument != "--quiet"]


def _made(folder: Path, command: list[object]) -> tuple[int, str]:
    code, said = crash.run(*command, "-o", folder / "out.mp4", log=folder / "log")
    assert code == 0, said
    return digest(folder / "out.mp4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    return _made(tmp_path_factory.mktemp("whole"), COMMAND)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    return _made(tmp_path_factory.mktemp("short"), SHORT)


def _resumes(path: Path, whole: tuple[int, str], command: list[object] = COMMAND) -> None:
    code, said = crash.run(*command, "-o", path, "--resume", log=path.with_suffix(".log"))
    assert code == 0, said
    assert digest(path) == whole
    assert not run_directory.directory_for(path).exists()
    assert list(path.parent.glob(".*")) == []


# ------------------------------------------------------------------------------------------------------------- disk


def _fail_at(operation: int, code: int, folder: Path, short: tuple[int, str]) -> bool:
    """One operation on the disk fails; returns whether the run had that many."""
    path = folder / f"{operation}-{code}.mp4"
    ended, said = crash.run(*SHORT, "-o", path, log=folder / "log", before=crash.Failing(operation, code))
    if ended == 0:  # a cache that could not be written is no failure
        assert digest(path) == short
        return crash.FAILED in said
    assert ended == 5, said
    assert str(folder) in said
    assert "Traceback" not in said
    _resumes(path, short, SHORT)
    return True


@pytest.mark.parametrize(("operation", "code"), [(4, errno.EACCES), (21, errno.EIO), (62, errno.ENOSPC)])
def test_a_failing_operation(operation: int, code: int, tmp_path: Path, short: tuple[int, str]) -> None:
    assert _fail_at(operation, code, tmp_path, short)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system in memory, of which `mount -o remount` changes the size."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_ten_full_disks(small_disk: Path, tmp_path: Path) -> None:
    path, log, full, whole = small_disk / "out.mp4", tmp_path / "log", 0, _made(tmp_path, LARGE)
    for kilobytes in (16, 60, 130, 190, 250, 400, 800, 1400, 2000, 2600, 24000):
        subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", small_disk], check=True)
        code, said = crash.run(*LARGE, "-o", path, log=log, before=crash.no_headroom)
        if code == 0:
            assert digest(path) == whole
        else:
            full += 1
            assert code == 5, said
            assert str(small_disk) in said
            assert "needed" in said or "needs about" in said
            assert "free" in said
            subprocess.run(["mount", "-o", "remount,size=24m", small_disk], check=True)
            assert crash.run(*LARGE, "-o", path, "--resume", log=log, before=crash.no_headroom)[0] == 0
            assert digest(path) == whole
            assert list(small_disk.iterdir()) == [path]
        path.unlink()
    print(f"{full} disks were too small")
    assert full == 10


def test_room_is_asked_for_before_every_chunk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills while a run works: it stops before it must, and goes on when there is room again."""
    path, left = tmp_path / "out.mp4", iter([10**9] * 5)
    with monkeypatch.context() as patch:
        patch.setattr(files, "free_bytes", lambda path: next(left, 30 * 2**20))
        assert generate(path, 40) == 5
    said = capsys.readouterr().err
    assert "the next chunk needs about 33.9 MB" in said
    assert str(path) in said
    assert run_directory.exists(run_directory.directory_for(path))
    assert generate(path, 40, "--resume") == 0
    assert digest(path)[0] == 40


# ---------------------------------------------------------------------------------------------------------- encoder


FAST = ("in the header", "half way, saying nothing", "hung half way")


@pytest.mark.parametrize(
    "when", [when if when in FAST else pytest.param(when, marks=pytest.mark.slow) for when in SCRIPT_ENDS]
)
def test_the_last_copy_dies_or_hangs(when: str, tmp_path: Path, short: tuple[int, str]) -> None:
    script, (ends, said) = tmp_path / "ffmpeg", SCRIPT_ENDS[when]
    # Asked for its version, before the work, it is as good as any.
    script.write_text(f'#!/bin/sh\n[ "$1" = -version ] && exit 0\nfor last; do :; done\n{ends}\n')
    script.chmod(0o755)
    path = tmp_path / "out.mp4"
    patience = 1.0 if when.startswith("hung") else 60.0
    child = crash.Run(*SHORT, "-o", path, log=tmp_path / "log", before=crash.Encoder(script, patience))
    assert child.wait() == 5
    assert said in child.said
    assert not path.exists()
    _resumes(path, short, SHORT)


@pytest.mark.parametrize("segment", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_encoder_of_the_growing_video_fails(segment: int, tmp_path: Path, whole: tuple[int, str]) -> None:
    path = tmp_path / "out.mp4"
    code, said = crash.run(*COMMAND, "-o", path, log=tmp_path / "log", before=crash.FailingSegment(segment))
    assert code == 5
    assert "the encoder died" in said
    _resumes(path, whole)


def test_a_slow_copy_is_no_hung_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, growing = tmp_path / "slow", tmp_path / "growing"
    script.write_text('#!/bin/sh\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.2; echo $i >> "$1"; done\n')
    script.chmod(0o755)
    monkeypatch.setattr(ffmpeg, "STALL_SECONDS", 2.0)
    with subprocess.Popen([script, growing], stderr=subprocess.PIPE) as process:
        assert ffmpeg._last_words(process, growing) == b""


# ------------------------------------------------------------------------------------------------------ bad numbers


def _check_nothing_bad_is_stored(path: Path) -> int:
    """Return the number of base chunks; every state is finite, every chunk shows something."""
    directory = run_directory.directory_for(path)
    for state in directory.glob("state/*.safetensors"):
        assert all(np.isfinite(array).all() for array in load_file(state).values())
    chunks = sorted(directory.glob("base/*.mkv"))
    assert all(lossless.read_lossless(chunk).std() > 0 for chunk in chunks)
    return len(chunks)


# Per chunk three steps: the initializer's calls 0 to 2, then the streaming stage's; and two chunks of the refiner.
STEPS = [(False, 0, 0), (False, 1, 0), (False, 2, 0), (False, 3, 1), (False, 4, 1), (False, 5, 1), (False, 11, 3)]
STEPS += [(True, 0, 2), (True, 3, 4), (True, 5, 4)]


@pytest.mark.parametrize(
    ("refiner", "at", "chunks"),
    [pytest.param(*step, marks=() if step[1] == 5 else pytest.mark.slow) for step in STEPS],
)
def test_a_nan_is_caught_in_its_chunk(
    refiner: bool, at: int, chunks: int, tmp_path: Path, whole: tuple[int, str]
) -> None:
    path = tmp_path / "out.mp4"
    code, said = crash.run(*COMMAND, "-o", path, log=tmp_path / "log", before=crash.Denoising(refiner, at))
    assert code == 7, said
    assert "NaN" in said
    assert not path.exists()
    assert _check_nothing_bad_is_stored(path) >= chunks if refiner else _check_nothing_bad_is_stored(path) == chunks
    _resumes(path, whole)


TOGETHER = ["--threads", "2"]


@pytest.mark.parametrize("at", [pytest.param(0, marks=pytest.mark.slow), 5, pytest.param(11, marks=pytest.mark.slow)])
def test_a_nan_is_caught_in_the_other_thread(at: int, tmp_path: Path, whole: tuple[int, str]) -> None:
    path, before = tmp_path / "out.mp4", crash.Denoising(False, at)
    code, said = crash.run(*COMMAND, *TOGETHER, "-o", path, log=tmp_path / "log", before=before)
    assert code == 7, said
    assert "NaN" in said
    assert "Traceback" not in said
    assert _check_nothing_bad_is_stored(path) == {0: 0, 5: 1, 11: 3}[at]
    _resumes(path, whole, [*COMMAND, *TOGETHER])


@pytest.mark.parametrize(
    "picture", [pytest.param(0, marks=pytest.mark.slow), pytest.param(17, marks=pytest.mark.slow), 30]
)
def test_a_nan_of_the_vae_is_caught(picture: int, tmp_path: Path, whole: tuple[int, str]) -> None:
    path = tmp_path / "out.mp4"
    code, said = crash.run(*COMMAND, "-o", path, log=tmp_path / "log", before=crash.Decoding(picture))
    assert code == 7, said
    assert "the VAE produced NaN" in said
    _check_nothing_bad_is_stored(path)
    _resumes(path, whole)


def test_black_frames_are_said_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from streamt2v.media import frames

    real = frames.unletterbox  # what the refiner does last
    monkeypatch.setattr(frames, "unletterbox", lambda images, size: torch.full_like(real(images, size), -1))
    path = tmp_path / "out.mp4"
    assert call("generate", PROMPT, "--frames", 20, "-o", path, *[a for a in TINY if a != "--quiet"]) == 0
    said = capsys.readouterr().err
    assert "frames 0 to 19 are black" in said
    assert "base frames" not in said
    assert digest(path)[0] == 20


# ----------------------------------------------------------------------------------------------------------- memory


OUT_OF_MEMORY = [(False, 0, torch.OutOfMemoryError), (False, 4, MemoryError), (True, 3, torch.OutOfMemoryError)]


@pytest.mark.parametrize(
    ("refiner", "at", "error"),
    [pytest.param(*case, marks=pytest.mark.slow if case[1] != 4 else ()) for case in OUT_OF_MEMORY],
)
def test_too_little_memory_once_leads_down_the_ladder(
    refiner: bool, at: int, error: type[Exception], tmp_path: Path, whole: tuple[int, str],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path, before = tmp_path / "out.mp4", crash.Denoising(refiner, at, error)
    code, said = crash.run(*LOUD, "-o", path, log=tmp_path / "log", before=before)
    assert code == 0, said
    assert said.count("out of memory; going on with 32 bit, one stage at a time, guidance in one batch") == 1
    assert digest(path) == whole
    assert call("info", path, "--json") == 0
    recipe = result(capsys)["recipe"]
    (change,) = recipe["changes"]
    assert change["changed"] == ["memory.keep_networks"]
    assert not recipe["memory"]["keep_networks"]


@pytest.mark.parametrize(("refiner", "at"), [pytest.param(False, 7, marks=pytest.mark.slow), (True, 3)])
def test_two_stages_at_once_that_lack_memory_go_one_after_the_other(
    refiner: bool, at: int, tmp_path: Path, whole: tuple[int, str]
) -> None:
    path, before = tmp_path / "out.mp4", crash.Denoising(refiner, at, torch.OutOfMemoryError)
    child = crash.Run(*LOUD, *TOGETHER, "-o", path, log=tmp_path / "log", before=before)
    assert child.wait() == 0, child.said
    assert child.said.count("out of memory; going on with 32 bit, one stage at a time") == 1
    assert digest(path) == whole


@pytest.mark.parametrize(
    ("refiner", "at"),
    [pytest.param(False, 0, marks=pytest.mark.slow), pytest.param(False, 4, marks=pytest.mark.slow), (True, 3)],
)
def test_too_little_memory_for_good_names_the_cheapest_plan(
    refiner: bool, at: int, tmp_path: Path, whole: tuple[int, str]
) -> None:
    path, before = tmp_path / "out.mp4", crash.Denoising(refiner, at, torch.OutOfMemoryError, times=10**6)
    code, said = crash.run(*LOUD, "-o", path, log=tmp_path / "log", before=before)
    assert code == 6, said
    assert said.count("going on with") == 3
    assert "guidance in two passes, small slices) needs about" in said
    assert not path.exists()
    if not run_directory.exists(run_directory.directory_for(path)):
        assert (refiner, at) == (False, 0)  # nothing was finished
        return
    memory = run_directory.recorded(run_directory.directory_for(path)).recipe["memory"]
    assert not memory["batched_guidance"]
    code, said = crash.run("resume", path, log=tmp_path / "log")
    assert code == 0, said
    assert digest(path)[0] == whole[0]


def test_a_gpu_has_one_more_step_to_go(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from streamt2v import config, devices, memory
    from streamt2v.jobs.job import Job
    from streamt2v.jobs.prepared import Prepared
    from streamt2v.runs import pipeline

    monkeypatch.setattr(devices, "free_memory", lambda device=None: 2 * 10**9)
    job = Job("generate", config.merge(config.preset("demo"), {"prompt": "a red ball"}), tmp_path / "out.mp4")
    fast, *sparing = memory.ladder("cuda")
    assert memory.more_sparing(fast, "cuda") == sparing
    assert memory.more_sparing(sparing[-1], "cuda") == []
    said = pipeline._more_room(Prepared(job), devices.Device("cuda:0"), sparing[pipeline.RETRIES :])
    assert "weights on the host" in said
    assert "--resume-anyway --memory" in said


# ------------------------------------------------------------------------------------------- the longest test, last


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_operation_fails_once(code: int, tmp_path: Path, short: tuple[int, str]) -> None:
    operation = 1
    while _fail_at(operation, code, tmp_path, short):
        operation += 1
    print(f"{operation - 1} operations failed with {errno.errorcode[code]}, all resumed equal")
    assert operation > 60


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_library_that_loses_a_signal_hides_none(
    sent: signal.Signals, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), sent)
            time.sleep(5)
        raise ValueError("could not determine the shape")

    monkeypatch.setattr(networks, "build", build)
    # Under nohup, or in a shell's background, it would be ignored.
    usual = signal.default_int_handler if sent == signal.SIGINT else signal.SIG_DFL
    before = signal.signal(sent, usual)
    try:
        assert generate(tmp_path / "a.mp4", 17) == code
        assert signal.getsignal(sent) is usual
    finally:
        signal.signal(sent, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (Terminated, 143), (HungUp, 129)])
def test_a_library_that_fails_while_it_is_stopped_hides_no_signal(
    stop: type[BaseException], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(*_: object) -> None:
        try:
            raise stop
        finally:
            raise RuntimeError("trying to pop from empty mode stack")

    monkeypatch.setattr(networks, "build", build)
    assert generate(tmp_path / "a.mp4", 17) == code
    assert list(tmp_path.iterdir()) == []
