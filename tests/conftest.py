"""What all tests share: one thread, tests that need what is not here are skipped, and where recorded tensors lie."""

import gc
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts: small networks only lose by more

import pytest
import typer

from streamt2v import config, weights
from streamt2v.errors import StreamT2VError
from streamt2v.media import isolated
from streamt2v.weights import catalog, hub
from tests import forked

REPOSITORY = Path(__file__).resolve().parent.parent


def golden_folder(name: str) -> Path | None:
    """The folder of recorded tensors `name`: the whole one, else the part kept with the tests, else None."""
    given = os.environ.get("STREAMT2V_GOLDENS")
    places = [Path(given)] if given else [REPOSITORY.parent / "shared" / "reference" / "goldens"]
    found = [place / name for place in [*places, REPOSITORY / "tests" / "data"] if (place / name).is_dir()]
    return found[0] if found else None


@pytest.hookimpl(optionalhook=True)  # where there is no xdist, nobody asks
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: tests wait a third of their time for disks and for processes to start or end."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session", autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees, or writes to, the weights that its user has pulled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STREAMT2V_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session", autouse=True)
def networks_are_built_once() -> Iterator[None]:
    from tests import copies  # with torch, for which the process that hands out the tests has no use

    with copies.built_once():
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_are_described_once() -> Iterator[None]:
    """A process runs one command line, and here more than a thousand: typer reads all signatures for each of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", cache(typer.main.get_command))
        yield


@pytest.fixture(scope="session", autouse=True)
def decoders_are_forked() -> Iterator[None]:
    """Where this system forks: half of what the tests of videos took was Python starting to look at one."""
    with pytest.MonkeyPatch.context() as patch, forked.decoders() as module:
        if sys.platform == "linux":
            patch.setattr(isolated, "subprocess", module)
        yield


@pytest.fixture(scope="session", autouse=True)
def disks_are_not_waited_for() -> Iterator[None]:
    """What was written outlives its process; waiting for the disk is for machines that lose their power."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True)
def online() -> Iterator[None]:
    """`--offline` sets variables of the process, which ends after it except in tests."""
    before = {name: os.environ.get(name) for name in hub.OFFLINE}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="session")
def goldens() -> Callable[[str], Path]:
    """Find a folder of recorded tensors by name; the test is skipped where there is none."""

    def find(name: str) -> Path:
        folder = golden_folder(name)
        if folder is None:
            pytest.skip(f"no recorded tensors {name!r} here")
        return folder

    return find


@pytest.fixture
def toy_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """List a family without networks beside the others: its videos take a second."""
    from streamt2v.families import makers
    from tests.families import toy

    presets, manifest = tmp_path / "presets", tmp_path / "weights.toml"
    shutil.copytree(config.PRESETS, presets)
    (presets / "toy.toml").write_text(toy.PRESET)
    manifest.write_text(catalog._manifest(catalog.PACKAGE).read_text("utf-8") + toy.ROW)
    monkeypatch.setattr(config, "PRESETS", presets)
    monkeypatch.setattr(catalog, "_manifest", lambda root: manifest)
    monkeypatch.setitem(makers.BUILDERS, "toy", "tests.families.toy")
    config.presets.cache_clear()
    yield
    config.presets.cache_clear()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What is imported stays: every look for garbage among the modules of torch and diffusers takes half a second."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot run here: `gpu` without a CUDA device, `weights("name")` without that family's files."""
    for item in items:
        for mark in item.iter_markers("weights"):
            if not _is_here(mark.args[0]):
                item.add_marker(pytest.mark.skip(reason=f"the weights of {mark.args[0]!r} are not here"))
        if item.get_closest_marker("gpu") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _is_here(family: str) -> bool:
    try:
        return not weights.missing(weights.family(family))
    except StreamT2VError:
        return False


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
