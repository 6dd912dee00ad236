"""The run directory: whatever write a run dies at, opening it again gives a state and frames that agree."""

import errno
import json
import multiprocessing
import os
import shutil
import threading
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamt2v import files
from streamt2v.errors import BusyError, OutputError, ResumeError
from streamt2v.jobs import run_directory, states
from streamt2v.jobs.run_directory import RunDirectory
from streamt2v.media import writing
from tests.crash import Trap

RECIPE = {"command": "generate", "config": {"seed": 7, "prompt": "a red ball \u00e9", "size": (48, 64)}}
CHUNKS = 3


def picture(index: int) -> np.ndarray:
    """The frames that chunk `index` adds; the first chunk is longer."""
    rng = np.random.default_rng(index)
    return rng.integers(0, 256, (3 if index == 0 else 2, 16, 16, 3), dtype=np.uint8)


def stored(run: RunDirectory, start: int = 0) -> np.ndarray:
    return np.concatenate([np.zeros((0, 16, 16, 3), np.uint8), *run.base_frames(start)])


def work(run: RunDirectory) -> None:
    """A whole run in miniature: a chain of chunks, each a function of the state before, and an output segment each."""
    state = run.resume_point("stream")
    value = 0.0 if state is None else float(state.arrays["value"])
    output = run.load_state("output")
    mark = None if output is None else writing.SegmentMark(**output.meta["mark"])
    writer = writing.SegmentWriter(run.partial_path, 16, 16, Fraction(8), resume=mark)
    done = 0 if output is None else output.meta["groups"]
    for index in range(CHUNKS):
        if index == run.num_base_chunks:
            run.append_base(index, picture(index))
            value = value * 3 + index + 1
            run.save_state("stream", {"value": np.array(value)}, {"chunk": index})
        if index >= done:
            mark = writer.append(picture(index))
            run.save_state("output", {}, {"groups": index + 1, "mark": mark.__dict__})


def check_whole(path: Path, expected_video: bytes) -> None:
    with RunDirectory.open(path, RECIPE, resume=True) as run:
        state = run.load_state("stream")
        assert state is not None
        assert float(state.arrays["value"]) == (1 * 3 + 2) * 3 + 3
        assert state.index == run.num_base_chunks == CHUNKS
        assert np.array_equal(stored(run), np.concatenate([picture(index) for index in range(CHUNKS)]))
        assert run.partial_path.read_bytes() == expected_video


def test_no_state_counts_a_chunk_that_has_none_of_its_own_yet(tmp_path: Path) -> None:
    """A run that died between the two would drop the chunk, and with it all that counts it."""
    with RunDirectory.open(tmp_path / "run", RECIPE, resume=False) as run:
        saving = threading.Thread(target=run.save_state, args=("output", {}))
        with run.joined:
            run.append_base(0, picture(0))
            saving.start()
            saving.join(0.2)
            assert run.load_state("output") is None
            run.save_state("stream", {})
        saving.join(60)
        states = [run.load_state(name) for name in ("stream", "output")]
        assert [state.index for state in states if state] == [1, 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The growing output of a run that was never interrupted."""
    with RunDirectory.open(tmp_path_factory.mktemp("whole") / "a.streamt2v", RECIPE, resume=False) as run:
        work(run)
        return run.partial_path.read_bytes()


def test_death_at_any_write_resumes_to_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    path, moments = tmp_path / "run.streamt2v", tmp_path / "moments"
    count = 0

    def photograph(name: str, when: str) -> None:
        nonlocal count
        if (when == "before" or name == "open") and count:  # shows the same as the last picture, or an empty file more
            return
        shutil.copytree(path, moments / f"{count}", dirs_exist_ok=True)
        count += 1

    with monkeypatch.context() as patch:
        patch.setattr(files, "os", Trap(photograph))
        with RunDirectory.open(path, RECIPE, resume=False) as run:
            work(run)
    assert count > 40
    resumed = 0
    for moment in moments.iterdir():
        resumed += run_directory.exists(moment)
        with RunDirectory.open(moment, RECIPE, resume=True) as run:
            work(run)
            assert list(moment.rglob(".*.part")) == []
        check_whole(moment, whole)
    assert resumed > count - 15


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_every_failing_write_is_an_output_error_and_can_be_retried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes, code: int
) -> None:
    failures = 0
    for fail_at in range(0, 1000, 3 if code == errno.ENOSPC else 9):
        path, calls = tmp_path / f"{fail_at}.streamt2v", 0

        def fail(_name: str, when: str, fail_at: int = fail_at) -> None:
            nonlocal calls
            calls += when == "before"
            if when == "before" and calls == fail_at + 1:
                raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Trap(fail))
            try:
                with RunDirectory.open(path, RECIPE, resume=True) as run:
                    work(run)
                break
            except OutputError as error:
                failures += 1
                assert str(path) in error.message
        with RunDirectory.open(path, RECIPE, resume=True) as run:
            work(run)
        check_whole(path, whole)
    assert failures > 5


def _die(path: Path, after: int, ready: "multiprocessing.synchronize.Event | None" = None) -> None:
    run = RunDirectory.open(path, RECIPE, resume=True)
    calls = 0

    def kill(_name: str, when: str) -> None:
        nonlocal calls
        calls += 1
        if calls == after:
            os._exit(9)

    files.os = Trap(kill)  # type: ignore[assignment]
    work(run)
    os._exit(0)


def test_a_killed_process_frees_the_lock_and_its_run_continues(tmp_path: Path, whole: bytes) -> None:
    path = tmp_path / "run.streamt2v"
    fork = multiprocessing.get_context("fork")
    for after in (5, 30, 41):
        child = fork.Process(target=_die, args=(path, after))
        child.start()
        child.join(30)
        assert child.exitcode == 9
    with RunDirectory.open(path, RECIPE, resume=True) as run:
        work(run)
    check_whole(path, whole)


def _try_lock(path: Path) -> None:
    try:
        RunDirectory.open(path, RECIPE, resume=True)
    except BusyError:
        os._exit(8)
    os._exit(0)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    fork = multiprocessing.get_context("fork")

    def try_it() -> int | None:
        child = fork.Process(target=_try_lock, args=(path,))
        child.start()
        child.join(30)
        return child.exitcode

    with RunDirectory.open(path, RECIPE, resume=False) as run:
        assert try_it() == 8
        with pytest.raises(BusyError, match="another process"):
            RunDirectory.open(path, RECIPE, resume=True)
        run.append_base(0, picture(0))
    assert try_it() == 0


def test_create_respects_what_is_there(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        run.append_base(0, picture(0))
        run.save_state("stream", {"a": np.zeros(1)})
    with RunDirectory.open(path, RECIPE, resume=True) as run:
        assert run.num_base_frames == 3
        assert run.recipe["config"]["seed"] == 7
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        assert run.num_base_frames == 0
        assert run.load_state("stream") is None
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    with pytest.raises(OutputError, match="not a run directory"):
        RunDirectory.open(foreign, RECIPE, resume=False)
    assert [child.name for child in foreign.iterdir()] == ["thesis.txt"]


def test_another_recipe_is_refused_by_its_first_key(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    RunDirectory.open(path, RECIPE, resume=False).close()
    RunDirectory.open(path, RECIPE, resume=True).close()
    other = {**RECIPE, "config": {**RECIPE["config"], "seed": 8}}  # type: ignore[dict-item]
    with pytest.raises(ResumeError, match=r"config\.seed = 7, now it is 8"):
        RunDirectory.open(path, other, resume=True)
    with pytest.raises(ResumeError, match="image = null, now it is 1"):
        RunDirectory.open(path, {**RECIPE, "image": 1}, resume=True)
    RunDirectory.open(path, other, resume=False).close()
    RunDirectory.open(path, other, resume=True).close()


def test_another_recipe_starts_again_where_that_is_wanted(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    for recipe, resumed in ((RECIPE, False), (RECIPE, True), ({**RECIPE, "version": "2"}, False)):
        with RunDirectory.open(path, recipe, resume=True, overwrite=True) as run:
            assert (run.resumed, run.num_base_chunks) == (resumed, CHUNKS * resumed)
            work(run)


def test_a_run_that_ended_while_its_lock_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.streamt2v"
    RunDirectory.open(path, RECIPE, resume=False).close()
    acquire = RunDirectory._acquire

    def wait(run: RunDirectory) -> None:
        shutil.rmtree(path)
        acquire(run)

    monkeypatch.setattr(RunDirectory, "_acquire", wait)
    with RunDirectory.open(path, RECIPE, resume=True) as run:
        assert not run.resumed
        assert run_directory.exists(path)


def test_no_run_a_damaged_one_and_a_newer_one(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    with pytest.raises(ResumeError, match="no run"):
        run_directory.recorded(path)
    assert not path.exists()
    RunDirectory.open(path, RECIPE, resume=False).close()
    files.write_json(path / "run.json", {"schema": 2, "recipe": {}})
    with pytest.raises(ResumeError, match="format 2"):
        RunDirectory.open(path, RECIPE, resume=True)
    for text in ("{", "[]", "null", '{"schema": 1}'):
        (path / "run.json").write_text(text)
        with pytest.raises(ResumeError, match="cannot be read"):
            RunDirectory.open(path, RECIPE, resume=True)


def test_seed_and_places(tmp_path: Path) -> None:
    output = tmp_path / "out.mp4"
    assert run_directory.directory_for(output) == tmp_path / "out.mp4.streamt2v"
    assert run_directory.recorded_seed(output) is None
    RunDirectory.open(run_directory.directory_for(output), RECIPE, resume=False).close()
    assert run_directory.recorded_seed(output) == 7
    assert run_directory.output_of(run_directory.directory_for(output)) == run_directory.output_of(output) == output
    run_directory.check_writable(tmp_path)
    with pytest.raises(OutputError, match="does not exist"):
        run_directory.check_writable(tmp_path / "none")
    with pytest.raises(OutputError, match="not a folder"):
        files.make_directory(run_directory.directory_for(output) / "run.json")
    with pytest.raises(OutputError, match="not a folder"):
        run_directory.check_writable(run_directory.directory_for(output) / "run.json")


def test_base_frames_from_any_start_and_while_growing(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run.streamt2v", RECIPE, resume=False) as run:
        for index in range(3):
            run.append_base(index, picture(index))
        total = np.concatenate([picture(index) for index in range(4)])
        for start in range(8):
            assert np.array_equal(stored(run, start), total[start:7])
        reader = run.base_frames(5)
        next(reader)
        run.append_base(3, picture(3))
        assert np.array_equal(np.concatenate(list(reader)), total[7:9])
        with pytest.raises(ValueError, match="chunk 3"):
            run.append_base(3, picture(3))
        with pytest.raises(ValueError, match="0 frames"):
            run.append_base(4, picture(3)[:0])


def test_a_damaged_base_chunk_is_named(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run.streamt2v", RECIPE, resume=False) as run:
        run.append_base(0, picture(0))
        path = next((run.path / "base").iterdir())
        path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(ResumeError, match="000000"):
            stored(run)


def test_a_gap_in_the_base_store_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        for index in range(4):
            run.append_base(index, picture(index))
            run.save_state("stream", {}, {"chunk": index})
        sorted((path / "base").iterdir())[2].unlink()
    with RunDirectory.open(path, RECIPE, resume=True) as run:
        assert (run.num_base_chunks, run.num_base_frames) == (2, 5)
        # Both kept states counted the lost chunk: nothing can be continued, so nothing is kept.
        assert run.resume_point("stream") is None
        assert run.num_base_frames == 0


def test_states_round_trip_every_dtype_and_shape(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run.streamt2v", RECIPE, resume=False) as run:
        tensors = {
            "half": torch.randn(2, 3).half(),
            "brain": torch.randn(4).bfloat16(),
            "turned": torch.arange(6, dtype=torch.float32).reshape(2, 3).T,
            "scalar": torch.tensor(3),
            "empty": torch.zeros(0, 4),
        }
        run.save_state("refine", {**tensors, "bytes": picture(0)[:, ::-1]}, {"step": 3, "names": ["a"]})
        state = run.load_state("refine")
        assert state is not None
        assert state.meta == {"step": 3, "names": ["a"]}
        assert np.array_equal(state.arrays["bytes"], picture(0)[:, ::-1])
        found = state.torch()
        assert found.keys() == {*tensors, "bytes"} and not state.arrays  # handed over: nothing is held twice
        for name, tensor in tensors.items():
            assert torch.equal(found[name].to(tensor.dtype), tensor)
            assert found[name].shape == tensor.shape
        assert run.load_state("stream") is None


@given(
    st.dictionaries(
        st.text(max_size=5),
        st.tuples(st.sampled_from(["?", "u1", "i2", "f2", "f4", "i8", "f8"]), st.lists(st.integers(0, 3), max_size=3)),
    ),
    st.text(max_size=9),
)
def test_a_state_is_a_file_as_the_library_writes_it(kinds: dict[str, tuple[str, list[int]]], text: str) -> None:
    arrays = {name: np.ones(shape, kind) for name, (kind, shape) in kinds.items() if name != "__metadata__"}
    data = b"".join(states._parts(arrays, {"meta": text}))
    assert len(data) % 8 == sum(array.nbytes for array in arrays.values()) % 8
    loaded = safetensors.numpy.load(data)
    assert loaded.keys() == arrays.keys()
    for name, array in arrays.items():
        assert loaded[name].dtype == array.dtype and np.array_equal(loaded[name], array)
    table = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert table["__metadata__"] == {"meta": text}
    assert all(row["data_offsets"][0] % arrays[name].itemsize == 0 for name, row in table.items() if name in arrays)


def test_a_state_is_written_from_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of its own: a refiner's state can be as large as all else in memory."""
    held = {"frames": np.zeros(1 << 24, np.uint8), "turned": np.zeros((2, 3)).T}
    with RunDirectory.open(tmp_path / "run.streamt2v", RECIPE, resume=False) as run:
        run.save_state("refine", {})  # what is imported by then is not counted
        tracemalloc.start()
        run.save_state("refine", held)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert most < 1 << 20


def test_two_states_are_kept_and_a_damaged_one_is_passed_over(tmp_path: Path) -> None:
    with RunDirectory.open(tmp_path / "run.streamt2v", RECIPE, resume=False) as run:
        for index in range(4):
            run.append_base(index, picture(index))
            run.save_state("stream", {"a": np.full(64, float(index))})
        kept = sorted((run.path / "state").iterdir())
        assert len(kept) == 2
        data = bytearray(kept[1].read_bytes())
        data[-3] ^= 1  # a bit of a tensor, which the format itself does not notice
        kept[1].write_bytes(data)
        state = run.resume_point("stream")
        assert state is not None
        assert (state.index, state.arrays["a"][0]) == (3, 2.0)
        assert run.num_base_chunks == 3
        run.append_base(3, picture(3))
        run.save_state("stream", {"a": np.full(64, 3.0)})
        assert run.load_state("stream").arrays["a"][0] == 3.0  # type: ignore[union-attr]


def test_remove_deletes_the_run_but_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        work(run)
    run.remove()
    assert not path.exists()
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        (path / "note.txt").write_text("mine")
        run.remove()
    assert [child.name for child in path.iterdir()] == ["note.txt"]


def test_a_half_removed_run_is_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "run.streamt2v"
    run = RunDirectory.open(path, RECIPE, resume=False)
    work(run)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "disk trouble")))
        with pytest.raises(OutputError, match="disk trouble"):
            run.remove()
    run.close()
    assert not run_directory.exists(path)
    with RunDirectory.open(path, RECIPE, resume=True) as fresh:
        assert fresh.num_base_chunks == 0


@pytest.mark.parametrize("gone", [(), ("run.json",), ("run.json", "base", "state", "lock")])
def test_what_is_left_of_a_finished_run_is_removed(gone: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    with RunDirectory.open(path, RECIPE, resume=False) as run:
        work(run)
        run_directory.discard(path)
        assert run_directory.exists(path)  # somebody works on it
    for name in gone:
        shutil.rmtree(path / name) if (path / name).is_dir() else (path / name).unlink()
    for child in path.iterdir() if "lock" in gone else ():
        child.unlink()
    run_directory.discard(path)
    assert not path.exists()
    run_directory.discard(path)


def test_a_folder_of_somebody_else_is_not_discarded(tmp_path: Path) -> None:
    path = tmp_path / "run.streamt2v"
    path.mkdir()
    (path / "note.txt").write_text("mine")
    run_directory.discard(path)
    assert [child.name for child in path.iterdir()] == ["note.txt"]


def test_space_is_asked_for_before_it_is_needed(tmp_path: Path) -> None:
    files.require_space(tmp_path / "not" / "yet" / "there", 1, "a run")
    with pytest.raises(OutputError, match=r"a run needs about 1e\+06 GB .* is free"):
        files.require_space(tmp_path, 10**15, "a run")


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (300, 0, "a run needs about 300 bytes at PATH, the disk is full"),
        (40_000, 2_000, "a run needs about 40 kB at PATH, 2 kB is free"),
        (2_500_000_000, 800_000_000, "a run needs about 2.5 GB at PATH, 800 MB is free"),
    ],
)
def test_sizes_are_said_as_people_say_them(
    needed: int, free: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: free)
    with pytest.raises(OutputError) as failed:
        files.require_space(tmp_path, needed, "a run")
    assert failed.value.message.replace(str(tmp_path), "PATH") == said


def test_importing_runs_loads_nothing_heavy() -> None:
    import subprocess
    import sys

    code = "import sys, streamt2v.runs; print([m for m in ('torch', 'av', 'PIL', 'safetensors') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_names_that_are_no_text_are_recorded(tmp_path: Path) -> None:
    """A picture's name may hold any bytes."""
    with RunDirectory.open(tmp_path / "run.streamt2v", {"image": "\udcff.png"}, resume=False) as run:
        assert run.recipe == {"image": "\udcff.png"}
