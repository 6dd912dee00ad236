"""benchmarks/gpu.py on a CPU: every step leaves rows, a crash loses only its own step, and a table is made of them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, speed, speed_page

REPOSITORY = Path(gpu.__file__).resolve().parents[1]
CRASH = 'import os, sys; print(\'{"name": "said before"}\', flush=True); os.kill(os.getpid(), 9)'
HANG = 'import time; print(\'{"name": "said before"}\', flush=True); time.sleep(60)'


def rows_of(folder: Path) -> list[dict[str, Any]]:
    (path,) = folder.glob("*-gpu-small.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def ends(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["step"]: row["code"] for row in rows if row["name"] == "end"}


def test_a_step_that_crashes_or_hangs_loses_only_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command, short = gpu.command_of, {"rules": CRASH, "parts": HANG}

    def broken(step: str, small: bool) -> list[str]:
        return [sys.executable, "-c", short[step]] if step in short else command(step, small)

    monkeypatch.setattr(gpu, "command_of", broken)
    monkeypatch.setitem(gpu.STEPS, "parts", gpu.STEPS["parts"]._replace(seconds=6 / gpu.PATIENCE))
    began = time.monotonic()
    gpu.main(["--small", "--out", str(tmp_path), "--only", "rules,parts,micro", "--total", "290"])
    rows = rows_of(tmp_path)
    assert ends(rows) == {"rules": -9, "parts": -9, "micro": 0}
    assert [row["step"] for row in rows if row["name"] == "said before"] == ["rules", "parts"]
    assert next(row for row in rows if row["step"] == "parts" and row["name"] == "end")["stopped"] == "after 6 s"
    assert sum(row["step"] == "micro" for row in rows) > 10
    assert time.monotonic() - began < 290
    assert not any("error" in row for row in rows)


def test_no_step_begins_after_the_end(tmp_path: Path) -> None:
    gpu.main(["--small", "--out", str(tmp_path), "--only", "facts,train", "--total", "1"])
    assert [row["stopped"] for row in rows_of(tmp_path)] == ["no time was left"] * 2


def test_an_unknown_step_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--only", "facts,all"])
    assert "no step all" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_page_is_made_of_the_rows(tmp_path: Path) -> None:
    rows = [
        {"step": "facts", "name": "machine", "card": "NVIDIA X", "date": "2026-12-01", "small": False,
         "packages": {"torch": "2.11.0"}},
        {"step": "micro", "name": "attention", "way": "FLASH", "ms": 2.0, "tflop": 0.5},
        {"step": "micro", "name": "attention", "way": "CUDNN", "error": "RuntimeError: a|b"},
        {"step": "micro", "name": "copy", "way": "pinned", "ms": 4.0, "gb": 0.1},
        {"step": "micro", "name": "end", "code": 0, "seconds": 3.0},
    ]  # fmt: skip
    (tmp_path / "2026-12-01-gpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = speed_page.table(tmp_path)
    assert "## NVIDIA X, 2026-12-01" in page
    assert "| micro | attention | FLASH | 2 | 250 TFLOP/s |  |" in page
    assert "| micro | attention | CUDNN |  |  | error RuntimeError: a/b |" in page
    assert "| micro | copy | pinned | 4 | 25 GB/s |  |" in page
    assert "Not run on CUDA" not in page


def test_the_page_is_fresh() -> None:
    """`python benchmarks/gpu.py --table` changes nothing; where there are no rows of a GPU, it says so."""
    page = speed_page.table(speed.RESULTS)
    assert speed.PAGE.read_text("utf-8") == page
    assert ("Not run on CUDA" in page) == (not list(speed.RESULTS.glob("*-gpu*.jsonl")))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_step_leaves_rows(tmp_path: Path) -> None:
    command = [sys.executable, REPOSITORY / "benchmarks" / "gpu.py", "--small", "--out", tmp_path, "--total", "1500"]
    subprocess.run(command, cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    rows = rows_of(tmp_path)
    assert ends(rows) == dict.fromkeys(gpu.STEPS, 0)
    for step in gpu.STEPS:
        assert [row for row in rows if row["step"] == step and row["name"] != "end"]
    assert not any("error" in row for row in rows)
    runs = [row for row in rows if row["name"] == "whole run"]
    assert len(runs) == 4 and all(row["equal"] for row in runs[:3])
    assert runs[3]["mean_levels"] < 0.05  # smaller batches: on some processors products round differently
    assert next(row for row in rows if row["name"] == "training")["steps_per_second"] > 0
    assert all(row["recognised"] for row in rows if row["name"] == "exhausted memory")
