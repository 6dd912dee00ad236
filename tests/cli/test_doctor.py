"""The doctor: finds what works, and reports what does not instead of failing on it."""

from pathlib import Path

import pytest

from streamt2v import weights
from streamt2v.cli import doctor
from streamt2v.errors import WeightsError


def test_this_machine_can_run_the_tests(tmp_path: Path) -> None:
    found = {check.name: check for check in doctor.checks(tmp_path)}
    assert [name for name in ("python", "torch", "ffmpeg", "PyAV", "writing") if not found[name].ok] == []
    assert "libx264" in found["ffmpeg"].found
    assert {f"weights {name}" for name in weights.families()} <= set(found)
    assert all(check.advice for check in found.values() if not check.ok)
    assert list(tmp_path.iterdir()) == []


def test_what_is_broken_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise WeightsError("the list is gone", "install again")

    monkeypatch.setattr(weights, "families", broken)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(tmp_path / "no-ffmpeg"))
    found = {check.name: check for check in doctor.checks(tmp_path / "no-folder", device="gpu")}
    assert "is not a device" in found["torch"].found
    assert "no-folder" in found["writing"].found
    assert found["weights"] == doctor.Check("weights", False, "the list is gone", "install again")
    bad = ("torch", "writing", "ffmpeg", "weights")
    assert all(not found[name].ok and found[name].advice for name in bad)


def test_missing_weights_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "missing", lambda family, *_: ["a.safetensors is missing"])
    check = next(check for check in doctor._weights() if check.name == "weights demo")
    assert not check.ok
    assert check.found == "a.safetensors is missing"
