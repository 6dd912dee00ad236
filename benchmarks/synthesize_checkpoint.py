"""Write a published checkpoint of random numbers at full size, convert it, and say what that took.

    python -m benchmarks.synthesize_checkpoint FOLDER                # streaming_t2v.ckpt, 25.6 GB, with optimizer state
    python -m benchmarks.synthesize_checkpoint FOLDER --file non_ema_0035000.pth
    python -m benchmarks.synthesize_checkpoint FOLDER --only-write   # do not convert

torch writes the file's real layout with holes for the numbers, which are then filled in one after the other: neither
writing nor converting holds more than one tensor. Converted files go to FOLDER/converted.
"""

import argparse
import json
import math
import os
import platform
import re
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from streamt2v.weights import catalog as weights
from streamt2v.weights import pickles, published
from tests.checkpoints import STREAM, Shapes, manifests, published_shapes

RESULTS = Path(__file__).parent / "results"
FROZEN = re.compile(r"base_model\..*(transformer_in|temp_attentions|temp_convs)\.|(image_encoder|text_encoder|vae)\.")
BLOCK = 2**24


def trained(shapes: Shapes) -> Shapes:
    """The tensors that the published training changed: those with two moments in its optimizer state."""
    return {key: shape for key, shape in shapes.items() if not FROZEN.match(key)}


def write(path: Path, shapes: Shapes, moments: Shapes) -> None:
    """Write a checkpoint as a training framework does: weights, then the optimizer's moments, all in float32."""
    with torch.serialization.skip_data():  # nobody touches the memory of these tensors, so none is used
        state = OrderedDict((key, torch.empty(shape)) for key, shape in shapes.items())
        optimizer = {
            index: {"step": 1000, "exp_avg": torch.empty(shape), "exp_avg_sq": torch.empty(shape)}
            for index, shape in enumerate(moments.values())
        }
        groups = [{"lr": 1e-5, "params": list(optimizer)}]
        torch.save(
            {"epoch": 0, "state_dict": state, "optimizer_states": [{"state": optimizer, "param_groups": groups}]}, path
        )
    fill(path)


def fill(path: Path) -> None:
    """Write numbers that networks survive: weights of unit gain, norms of one, small biases; any into the moments."""
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    places = {row.start: (key, row.shape) for key, row in pickles.read(path).tensors.items()}
    with zipfile.ZipFile(path) as archive, path.open("r+b") as stream:
        for entry in archive.infolist():
            if "/data/" not in entry.filename:
                continue
            stream.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", stream.read(4))
            stream.seek(entry.header_offset + 30 + name_length + extra_length)
            key, shape = places.get(stream.tell(), ("", ()))
            norm = len(shape) == 1 and key.endswith("weight")
            scale = 0.5 / math.sqrt(math.prod(shape[1:])) if len(shape) > 1 else 0.02
            for left in range(entry.file_size // 4, 0, -BLOCK):
                numbers = block[: min(left, BLOCK)] * scale + (1.0 if norm else 0.0)
                stream.write(numbers.numpy().data)


def measure(source: Path, destination: Path) -> dict[str, Any]:
    """Convert in a process of its own and return time and peak resident memory."""
    code = "import sys; from streamt2v.cli.app import main; main(['weights', 'convert', *sys.argv[1:]])"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code, source, destination], check=True, capture_output=True, text=True)
    seconds = time.monotonic() - began
    written = [Path(line) for line in done.stdout.splitlines()]
    return {
        "file": source.name,
        "bytes": source.stat().st_size,
        "seconds": round(seconds, 1),
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024, 1),
        "written_bytes": sum(path.stat().st_size for path in written),
        "written": {path.relative_to(destination).as_posix(): path.stat().st_size for path in written},
    }


def load_all(folder: Path, written: Iterable[str]) -> dict[str, float]:
    """Load every network strictly in 16 bit and return the seconds each took."""
    seconds = {}
    for name in sorted({re.sub(r"(-\d+-of-\d+)?\.safetensors.*", ".safetensors", name) for name in written}):
        if name.endswith(".safetensors"):
            began = time.monotonic()
            network = weights.load_module(folder / name, "cpu", torch.float16)
            assert not any(parameter.is_meta for parameter in network.parameters())
            seconds[name] = round(time.monotonic() - began, 2)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--file", default=STREAM, choices=sorted(manifests()))
    parser.add_argument("--only-write", action="store_true")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    path = arguments.folder / arguments.file
    shapes = published_shapes(published.CHECKPOINTS)[arguments.file]
    if not path.exists():
        began = time.monotonic()
        write(path, shapes, trained(shapes) if arguments.file == STREAM else {})
        print(f"{path}: {len(shapes)} tensors, {path.stat().st_size:,} bytes, {time.monotonic() - began:.0f} s")
    if arguments.only_write:
        return
    result = measure(path, arguments.folder / "converted")
    result |= {
        "load_seconds": load_all(arguments.folder / "converted", result["written"]),
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"{date.today().isoformat()}-convert-{path.stem}.json"
    target.write_text(json.dumps(result, indent=2) + "\n", "utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
