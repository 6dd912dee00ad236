"""Converting published checkpoints to our weights files: recognised by all keys, written tensor by tensor in 16 bit.

Nothing is written until every key and shape of every file is known to fit. Memory holds one tensor at a time.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from streamt2v import files
from streamt2v.errors import InputError, WeightsError
from streamt2v.weights import header, networks, pickles, published_svd
from streamt2v.weights.fetch import Note
from streamt2v.weights.keymaps import check_prefixes
from streamt2v.weights.pickles import Stored
from streamt2v.weights.published import CHECKPOINTS, IFNET, Layout, Part
from streamt2v.weights.tokenizer import clip_tokenizer

if TYPE_CHECKING:
    from streamt2v.weights.keymaps import Reshape

    Source = tuple[Stored, tuple[str, ...], Reshape | None]

Tensors = Mapping[str, Stored]
MAX_SHARD_BYTES = 2 * 2**30
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
LAYOUTS: Mapping[str, Layout] = {
    **CHECKPOINTS,
    "streaming_svd.safetensors": published_svd.LAYOUT,
    "rife_v4.26.safetensors": IFNET,
}
FLOATS = {"F64", "F32", "F16", "BF16"}


@dataclass(frozen=True)
class _Network:
    """One weights file to write: its name and metadata, the tensors to read, and the final shapes."""

    name: str
    metadata: Mapping[str, str]
    sources: tuple[Source, ...]
    shapes: Mapping[str, tuple[int, ...]]

    def bytes_of(self, source: Source) -> int:
        """Return the converted size of a tensor of the checkpoint."""
        return sum(2 * math.prod(self.shapes[target]) for target in source[1])

    @property
    def num_bytes(self) -> int:
        """Size of all tensors."""
        return sum(map(self.bytes_of, self.sources))


def convert(source: Path, destination: Path, note: Note, layouts: Mapping[str, Layout] = LAYOUTS) -> list[Path]:
    """Write the networks of a published checkpoint, and their tokenizer, as our own files; return their paths.

    Args:
        source: a file; or a folder of checkpoints, or of one subfolder per network (as in VidXTend).
        destination: the folder for files such as `stream/unet.safetensors`; networks above 2 GiB are split.
        note: called with one sentence per file.
        layouts: the known checkpoints.

    Raises:
        InputError: there is nothing to read.
        WeightsError: a file is damaged, or its keys and shapes are not exactly those of a known checkpoint.
        OutputError: the files cannot be written.
    """
    planned: dict[str, _Network] = {}
    taken: dict[str, str] = {}
    seen: list[Layout] = []
    tokenizers: dict[str, None] = {}
    for name, archive in _read(source, layouts).items():
        if archive.refused:
            note(f"{name} refers to {', '.join(archive.refused[:3])}: not imported, only tensors are read")
        layout, found = _plan(name, archive.tensors, layouts)
        if any(layout is known for known in seen):
            raise WeightsError(f"{source} has {min(found)} twice, the second time in {name}", "convert one file alone")
        seen.append(layout)
        for tower in sorted(taken.keys() & found.keys()):  # several published files contain the same one
            note(f"{tower} is taken from {taken[tower]}; {name} has it too")
            del found[tower]
        planned |= found
        taken |= dict.fromkeys(found, name)
        tokenizers |= dict.fromkeys(filter(None, [layout.tokenizer]))
    files.require_space(destination, sum(network.num_bytes for network in planned.values()), "the conversion")
    written = []
    for network in planned.values():
        paths = _write(destination / f"{network.name}.safetensors", network)
        note(f"{paths[-1]}: {len(network.shapes):,} tensors, {network.num_bytes / 1e6:,.0f} MB")
        written += paths
    for tokenizer in tokenizers:
        path = destination / f"{tokenizer}.json"
        files.make_directory(path.parent)
        files.write_bytes(path, clip_tokenizer().to_str().encode())
        note(f"{path}: the tokenizer of CLIP")
        written.append(path)
    return written


def _read(source: Path, layouts: Mapping[str, Layout]) -> dict[str, pickles.Archive]:
    """Find the checkpoints at `source`, by name."""
    if not source.is_dir():
        return {source.name: pickles.read(source)}
    modules = {part.keys.prefix.rstrip(".") for layout in layouts.values() for part in layout.parts.values()}
    found = {path.name: _files(path) for path in sorted(source.iterdir()) if path.name in modules and path.is_dir()}
    if not any(found.values()):
        if not (alone := _files(source)):
            raise InputError(f"{source} holds no checkpoints", f"known endings: {' '.join(SUFFIXES)}")
        return {path.name: pickles.read(path) for path in alone}
    tensors: dict[str, Stored] = {}
    for module, paths in found.items():
        tensors |= {f"{module}.{key}": row for path in paths for key, row in pickles.read(path).tensors.items()}
    return {source.name: pickles.Archive(tensors)}


def _files(folder: Path) -> list[Path]:
    """Return the checkpoints in a folder; if one comes in several forms, prefer safetensors and 16 bit."""
    found = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())
    stems = {path.name.removesuffix(path.suffix) for path in found if path.suffix == ".safetensors"}
    kept = [path for path in found if path.suffix == ".safetensors" or path.name.removesuffix(path.suffix) not in stems]
    halves = {path.name.replace(".fp16.", ".") for path in kept if ".fp16." in path.name}
    return [path for path in kept if path.name not in halves]


def _plan(name: str, tensors: Tensors, layouts: Mapping[str, Layout]) -> tuple[Layout, dict[str, _Network]]:
    """Recognise a checkpoint and lay out every network in it. Raises WeightsError naming the first wrong key."""
    layout = max(layouts.values(), key=lambda layout: _fit(layout, tensors))
    if not _fit(layout, tensors):
        raise WeightsError(f"{name} is not a known checkpoint: its first key is {next(iter(tensors))!r}")
    try:
        check_prefixes(tensors, [part.keys for part in layout.parts.values()], layout.ignored)
        found = {output: _lay_out(output, part, tensors) for output, part in layout.parts.items()}
    except WeightsError as error:
        raise WeightsError(f"{name}: {error.message}", error.hint) from error
    return layout, found


def _fit(layout: Layout, tensors: Iterable[str]) -> int:
    """Return how many keys a layout knows; the right one knows them all. Prefixes alone would mislead."""
    known = [part.keys for part in layout.parts.values()]
    ignored = tuple(layout.ignored)
    return sum(key.startswith(ignored) or any(keys.rename(key) is not None for keys in known) for key in tensors)


def _lay_out(output: str, part: Part, tensors: Tensors) -> _Network:
    """Check the keys and shapes of one network against the network itself."""
    import torch

    own = {key: row for key, row in tensors.items() if key.startswith(part.keys.prefix)}
    network = networks.build(Path(output), part.network, part.config)
    shapes = networks.shapes(network)
    part.keys.apply({key: torch.empty(row.shape, device="meta") for key, row in own.items()}, shapes)
    sources: list[Source] = []
    for key, row in own.items():
        targets, reshape = part.keys.rename(key) or ((), None)
        if targets and row.dtype not in FLOATS:
            raise WeightsError(f"{part.keys.what}: {key!r} holds numbers of type {row.dtype}")
        sources += [(row, targets, reshape)] if targets else []
    metadata = header.metadata_of(part.network, networks.config_of(network), part.schedule)
    return _Network(output, metadata, tuple(sources), shapes)


def _write(path: Path, network: _Network) -> list[Path]:
    """Write one network completely or not at all; above the limit as several files, and last their index."""
    groups: list[list[Source]] = [[]]
    size = 0
    for source in network.sources:
        if groups[-1] and size + network.bytes_of(source) > MAX_SHARD_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(source)
        size += network.bytes_of(source)
    files.make_directory(path.parent)
    names = [f"{path.stem}-{index:05}-of-{len(groups):05}.safetensors" for index in range(1, len(groups) + 1)]
    written = [path] if len(groups) == 1 else [path.with_name(name) for name in names]
    if len(groups) > 1:
        table = {target: name for name, group in zip(names, groups, strict=True) for _, ts, _ in group for target in ts}
        listed = {"metadata": {**network.metadata, "total_size": network.num_bytes}, "weight_map": table}
        written.append(header.shard_index(path))
    with contextlib.ExitStack() as stack:  # leaving it renames the files in reverse order: the index last
        temporaries = [stack.enter_context(files.replacing(target)) for target in reversed(written)][::-1]
        if len(groups) > 1:
            temporaries.pop().write_text(json.dumps(listed, indent=1), "utf-8")
        for temporary, group in zip(temporaries, groups, strict=True):
            with temporary.open("xb") as stream:
                _write_tensors(stream, network, group)
    _remove_others(path, written)
    return written


def _remove_others(path: Path, written: list[Path]) -> None:
    """Remove what an earlier conversion into another number of parts left behind."""
    parts = path.parent.glob(f"{path.stem}-?????-of-?????.safetensors")
    for old in {path, header.shard_index(path), *parts}.difference(written):
        with files.output_errors(old):
            old.unlink(missing_ok=True)


def _write_tensors(stream: BinaryIO, network: _Network, group: list[Source]) -> None:
    """Write a safetensors file: its header, then one tensor after the other."""
    rows: dict[str, object] = {"__metadata__": dict(network.metadata)}
    end = 0
    for _, targets, _ in group:
        for target in targets:
            start, end = end, end + 2 * math.prod(network.shapes[target])
            rows[target] = {"dtype": "F16", "shape": network.shapes[target], "data_offsets": [start, end]}
    text = json.dumps(rows).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for stored, targets, reshape in group:
        tensor = stored.read()
        for target, value in zip(targets, [tensor] if reshape is None else reshape(tensor), strict=True):
            half = value.half().contiguous()
            if not half.isfinite().all():
                raise WeightsError(f"{target} has values that are not finite in 16 bit")
            stream.write(half.numpy().data)
