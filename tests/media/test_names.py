"""What is read is never written over, whatever the name; a run goes on after its folder was moved.

Reported for other tools as mipops/dvrescue#56 (an input is written over), ray-project/ray#28082 and
MrNeRF/LichtFeld-Studio#599 (a moved folder).
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from streamt2v import files
from streamt2v.config import merge
from streamt2v.errors import ResumeError
from streamt2v.jobs import again, run_directory
from streamt2v.jobs.job import Job
from streamt2v.jobs.prepared import Prepared
from streamt2v.runs import pipeline
from streamt2v.runs.output import Output
from tests.cli.helpers import call, made
from tests.media.makers import refine

GENERATE = ["--frames", 8, "--no-refine", "--steps", 1, "--threads", 1, "--seed", 1, "-q"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save("start.png")
    made(tmp_path / "in.mp4", 8)
    Path("other.csv").write_text("mine")
    Path("timeline.json").write_text('{"0": "a red ball"}')
    Path("link.mp4").symlink_to("in.mp4")
    Path("link.png").symlink_to("start.png")
    os.link("start.png", "same.png")
    os.link("in.mp4", "same.mp4")
    Path("folder").mkdir()
    return tmp_path


INPUTS = {
    "preview": ["generate", "a red ball", "--image", "start.png", "--preview", "start.png", "-o", "out.mp4", *GENERATE],
    "preview by link": [
        "generate", "a red ball", "--image", "start.png", "--preview", "link.png", "-o", "out.mp4", *GENERATE,
    ],
    "preview by second name": [
        "generate", "a red ball", "--image", "start.png", "--preview", "same.png", "-o", "out.mp4", *GENERATE,
    ],
    "preview by another way": [
        "generate", "a red ball", "--image", "start.png", "--preview", "folder/../start.png", "-o", "out.mp4",
        *GENERATE,
    ],
    "refine": ["refine", "in.mp4", "-o", "in.mp4"],
    "refine by link": ["refine", "in.mp4", "-o", "link.mp4"],
    "refine by second name": ["refine", "in.mp4", "-o", "same.mp4"],
    "refine a link": ["refine", "link.mp4", "-o", "in.mp4"],
    "extend": ["extend", "in.mp4", "--frames", 40, "--prompt", "a red ball", "-o", "link.mp4"],
    "rerun": ["rerun", "in.mp4", "-o", "in.mp4"],
    "report": ["report", "in.mp4", "-o", "same.mp4"],
    "picture preview": ["preview", "start.png", "-o", "link.png"],
    "report of evaluate": ["evaluate", "in.mp4", "--clip", "none", "--report", "link.mp4"],
    "csv of evaluate": ["evaluate", "in.mp4", "--clip", "none", "--against", "same.mp4", "--csv", "in.mp4"],
    "two outputs of evaluate": ["evaluate", "in.mp4", "--clip", "none", "--csv", "x.csv", "--frames-csv", "x.csv"],
    "two previews": ["preview", "in.mp4", "-o", "x.png", "-o", "./x.png"],
}  # fmt: skip


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", INPUTS)
def test_no_input_is_written_over(name: str, overwrite: bool, here: Path) -> None:
    pytest.importorskip("cv2")
    before = {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()}
    assert call(*INPUTS[name], *(["--overwrite"] if overwrite else [])) in (2, 3, 5)
    assert {path.name: path.read_bytes() for path in here.iterdir() if path.is_file()} == before


def test_a_preview_that_exists_needs_overwrite(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy("start.png", "mine.png")
    command = ["generate", "a red ball", "--preview", "mine.png", "-o", "out.mp4", *GENERATE]
    assert call(*command) == 5
    assert Path("mine.png").read_bytes() == Path("start.png").read_bytes()
    monkeypatch.setattr(pipeline, "make", lambda known, report: None)
    with pytest.raises((SystemExit, AttributeError, TypeError)):  # it got past the checks
        call(*command, "--overwrite")


def test_the_files_of_a_batch_are_safe(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("jobs.jsonl").write_text(
        '{"prompt": "a red ball", "image": "folder/b.png"}\n{"prompt": "a blue ball", "preview": "b.png"}\n'
    )
    shutil.copy("start.png", "folder/b.png")
    assert call("batch", "jobs.jsonl", "--out-dir", "folder", "--no-refine", "--steps", 1, "-q", "--overwrite") == 2
    assert "is the picture that a row starts from" in capsys.readouterr().err
    assert Path("folder/b.png").read_bytes() == Path("start.png").read_bytes()


def test_names_of_one_file(here: Path) -> None:
    for name in ("in.mp4", "link.mp4", "same.mp4", "folder/../in.mp4", "./in.mp4"):
        assert files.is_same(Path(name), here / "in.mp4")
    for name in ("start.png", "none.mp4", "folder"):
        assert not files.is_same(Path(name), here / "in.mp4")
    assert files.is_same(Path("none.mp4"), Path("folder/../none.mp4"))


# -------------------------------------------------------------------------------------------------------- moved folders


def begun(folder: Path, source: str = "in.mp4", output: str = "out.mp4") -> Path:
    """Leave a run of refine in a folder as one that was stopped does."""
    folder.mkdir(exist_ok=True)
    (folder / source).parent.mkdir(exist_ok=True)
    made(folder / source, 8)
    job = Job(
        "refine", merge({"prompt": "a red ball", "num_frames": 8}), folder / output, folder / source,
        preview=folder / "sheet.png",
    )  # fmt: skip
    recipe = {**Prepared(job).recipe(), "device": "cpu"}
    run_directory.RunDirectory.open(job.run_path, recipe, resume=False, local=job.local()).close()
    return folder


@pytest.mark.parametrize("source", ["in.mp4", "clips/in.mp4"])
def test_a_run_finds_its_source_in_a_moved_folder(source: str, tmp_path: Path) -> None:
    moved = begun(tmp_path / "job", source).rename(tmp_path / "moved")
    found = again.resumed(moved / "out.mp4")
    assert found.source is not None and found.source.resolve() == moved / source
    assert found.preview == moved / "sheet.png"


def test_a_source_that_stayed_where_it_was_is_taken(tmp_path: Path) -> None:
    begun(tmp_path / "job")
    for name in ("out.mp4.streamt2v",):
        shutil.move(tmp_path / "job" / name, tmp_path / name)
    assert again.resumed(tmp_path / "out.mp4").source == tmp_path / "job" / "in.mp4"


def test_a_source_beside_the_output_is_taken_if_it_is_the_same(tmp_path: Path) -> None:
    begun(tmp_path / "job")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("out.mp4.streamt2v", "in.mp4"):
        shutil.move(tmp_path / "job" / name, elsewhere / name)
    assert again.resumed(elsewhere / "out.mp4").source == elsewhere / "in.mp4"
    made(elsewhere / "in.mp4", 9)
    with pytest.raises(ResumeError, match="has other contents"):
        again.resumed(elsewhere / "out.mp4")
    (elsewhere / "in.mp4").unlink()
    with pytest.raises(ResumeError, match="does not exist") as caught:
        again.resumed(elsewhere / "out.mp4")
    assert "put in.mp4 into" in caught.value.hint


def test_runs_of_an_older_version_are_resumed(tmp_path: Path) -> None:
    folder = begun(tmp_path / "job")
    record = run_directory.recorded(folder / "out.mp4.streamt2v")
    local = {key: value for key, value in record.local.items() if key != "from_output"}
    files.write_json(folder / "out.mp4.streamt2v" / "run.json", {"schema": 1, "recipe": record.recipe, "local": local})
    assert again.resumed(folder / "out.mp4").source == folder / "in.mp4"


def test_a_moved_run_ends(tmp_path: Path, unrefined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    made(folder / "in.mp4", 16)
    real = Output.finish
    monkeypatch.setattr(Output, "finish", lambda output: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert refine(folder / "in.mp4", folder / "out.mp4") == 130
    monkeypatch.setattr(Output, "finish", real)
    moved = folder.rename(tmp_path / "moved")
    assert call("resume", moved / "out.mp4", "-q") == 0
    assert call("verify", moved / "out.mp4") == 0
