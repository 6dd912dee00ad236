"""Networks that are built from their files once: that was half of a small run."""

import copy
import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from streamt2v import files
from streamt2v.weights import networks


class Copies:
    """Copies of a network. `copy.deepcopy` looks at everything in it one by one: that was a quarter of a small run."""

    def __init__(self, network: object) -> None:
        tensors, written = list[object](), io.BytesIO()

        class Pickler(pickle.Pickler):
            def persistent_id(self, thing: object) -> int | None:
                if not isinstance(thing, torch.Tensor):
                    return None
                tensors.append(thing)
                return len(tensors) - 1

        Pickler(written).dump(network)
        self.tensors, self.pickled = tensors, written.getvalue()

    def make(self) -> Any:
        """Return one more, with tensors of its own; what shares one in the network shares one in its copy."""
        memo: dict[int, object] = {}

        class Unpickler(pickle.Unpickler):
            def persistent_load(unpickler, number: int) -> object:
                return copy.deepcopy(self.tensors[number], memo)

        return Unpickler(io.BytesIO(self.pickled)).load()


@contextmanager
def built_once() -> Iterator[None]:
    """While this lasts, each network is built from its file once, and every run gets a copy."""
    load, build, kept = networks.load_module, networks.build, dict[object, Copies]()

    def copied(path: Path, device: Any, dtype: torch.dtype) -> Any:
        # A pretended GPU keeps account of every tensor that is made; and some tests let building fail.
        real = torch.cuda.is_available() or networks.build is not build
        if real or str(device) != "cpu" or not path.is_file():
            return load(path, device, dtype)
        key = path, files.stamp(path), dtype
        if key not in kept:
            kept[key] = Copies(load(path, device, dtype))
        return kept[key].make()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "load_module", copied)
        yield
