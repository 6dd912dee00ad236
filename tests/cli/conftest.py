"""Pipelines of others in tiny form, made once for all tests of the command line."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.helpers import STARTS, FolderOf


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> FolderOf:
    """Make a pipeline's folder once, when it is first asked for."""
    root = tmp_path_factory.mktemp("pipelines")

    def find(name: str) -> Path:
        from tests import pipelines

        folder = root / name
        return folder if folder.is_dir() else getattr(pipelines, name)(folder)

    return find


@pytest.fixture(scope="session")
def start(folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[object]]:
    """Options that name one of `STARTS`."""
    picture = tmp_path_factory.mktemp("picture") / "start.png"
    Image.fromarray(np.linspace(0, 255, 50 * 70 * 3).astype(np.uint8).reshape(50, 70, 3)).save(picture)

    def options(name: str) -> list[object]:
        model, artists, pictured, _ = STARTS[name]
        given: list[object] = ["--init", folder_of(model)]
        drawing = ["--image-init", folder_of(artists)] if artists else []
        return given + drawing + (["--image", picture] if pictured else [])

    return options
