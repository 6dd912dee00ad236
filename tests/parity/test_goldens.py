"""The package against tensors recorded from the published code, and the check against planted mistakes."""

from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.__main__ import check, main
from tests.parity.report import Report

DATA = Path(__file__).resolve().parents[1] / "data"


@pytest.mark.parametrize("name", ["stage2", "stage3", "streamingsvd"])
def test_equals_the_recorded_tensors(name: str) -> None:
    report = check(DATA / name)
    assert report.passed, "\n".join(report.lines())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stage2", "stage3", "streamingsvd"])
def test_equals_all_recorded_tensors(name: str, goldens: Callable[[str], Path]) -> None:
    report = check(goldens(name))
    assert report.passed, "\n".join(report.lines())


def spoil(path: Path, tensor: str) -> None:
    tensors = load_file(path)
    tensors[tensor] = tensors[tensor] * 1.01
    save_file(tensors, path)


def test_a_wrong_tensor_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copytree(
        DATA / "stage3", tmp_path, dirs_exist_ok=True, ignore=lambda _, names: {n for n in names if "vae" not in n}
    )
    assert main([str(tmp_path)]) == 0
    spoil(tmp_path / "vae_pixels.safetensors", "z")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "vae_pixels: z is off by 0.0099" in out
    assert out.splitlines()[-1].startswith("FAILED: 10 quantities in 1 files, 1 outside")


def test_a_frame_of_another_chunk_is_found(tmp_path: Path) -> None:
    folder = DATA / "streamingsvd"
    copytree(folder, tmp_path, dirs_exist_ok=True, ignore=lambda _, names: {n for n in names if n.startswith("a")})
    assert check(tmp_path).passed
    blend = load_file(tmp_path / "blend_a.safetensors")
    blend["offsets"][0] = (blend["offsets"][0] + 1) % 12
    save_file(blend, tmp_path / "blend_a.safetensors")
    failures = check(tmp_path).failures
    assert any("recorded chunks composed" in failure for failure in failures)
    assert any("latents_out" in failure for failure in failures)


def test_a_wrong_weight_and_an_unknown_output_are_found(tmp_path: Path) -> None:
    kept = ("config.json", "components.safetensors", "weights_")
    copytree(
        DATA / "stage2", tmp_path, dirs_exist_ok=True,
        ignore=lambda _, names: {n for n in names if not n.startswith(kept)},
    )  # fmt: skip
    components = load_file(tmp_path / "components.safetensors")
    save_file(components | {"out.new": torch.zeros(1)}, tmp_path / "components.safetensors")
    spoil(tmp_path / "weights_base_model_0.safetensors", "base_model.conv_out.weight")
    report = check(tmp_path)
    assert any("unet.full" in failure for failure in report.failures)
    assert not any("apm_context" in failure or "cam.down" in failure for failure in report.failures)
    assert report.problems == ["components: the recorded output 'new' is not one this check knows"]


def test_a_file_that_cannot_be_read_is_a_problem_and_the_others_are_still_checked(tmp_path: Path) -> None:
    copytree(
        DATA / "stage3", tmp_path, dirs_exist_ok=True,
        ignore=lambda _, names: {n for n in names if not n.startswith(("schedule", "cfg"))},
    )  # fmt: skip
    (tmp_path / "cfg_step.safetensors").write_bytes(b"broken")
    report = check(tmp_path)
    assert list(report.errors) == ["schedule"]
    assert not report.failures
    assert [problem.partition(":")[0] for problem in report.problems] == ["cfg_step"]
    assert not report.passed


def test_a_folder_of_no_known_kind_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_nan_and_another_shape_never_pass() -> None:
    report = Report()
    report.compare("a", "nan", torch.tensor([torch.nan]), torch.tensor([1.0]), 1.0)
    report.compare("a", "shape", torch.zeros(2), torch.zeros(3), 1.0)
    report.compare("a", "infinity", torch.tensor([1.0, 2.0]), torch.tensor([torch.inf, 2.0]), 1.0)
    report.compare("a", "same", torch.tensor([torch.inf, 2.0]), torch.tensor([torch.inf, 2.0]), 0.0)
    assert len(report.failures) == 3
    assert not Report().passed
