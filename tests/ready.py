"""The demo's networks, built in the process whose forks are runs (tests/crash.py): a run is given them as they are."""

from pathlib import Path
from typing import Any

import torch

from streamt2v import files, weights
from streamt2v.weights import networks

ROLES = ("stream.unet", "stream.cam", "stream.apm", "stream.vae", "stream.text", "stream.image", "refine.unet")
PATHS = [weights.family("demo").path(role) for role in ROLES]
BUILT = {(path, files.stamp(path)): networks.load_module(path, "cpu", torch.float32) for path in PATHS}
load = networks.load_module


def given(path: Path, device: Any, dtype: torch.dtype) -> Any:
    """Return a network that was built, to the first who asks; load it for others."""
    built = BUILT.pop((path, files.stamp(path)), None) if (str(device), dtype) == ("cpu", torch.float32) else None
    return load(path, device, dtype) if built is None else built
