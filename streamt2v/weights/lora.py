"""LoRA: small matrices that change layers of a network. Checked by headers alone, merged when the network loads.

A layer with weights W [out, in, ...] becomes W + strength * alpha / r * B A, where A ("down") has r rows as wide as the
layer's input and B ("up") has r columns. Source: arXiv 2106.09685. What a file does not say of alpha is r.

Files come from many trainers. A layer is found by its name with underscores for dots, less the prefixes of these
trainers, and by the name that the model's authors gave it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from streamt2v import files
from streamt2v.errors import WeightsError, signals_wait
from streamt2v.weights import catalog, folders, header
from streamt2v.weights.header import Row
from streamt2v.weights.keymaps import KeyMap, rename

if TYPE_CHECKING:
    import torch

Given = tuple[Path, float]
"""A file and its strength."""

_KEY = re.compile(r"(.+?)\.(?:(lora_A|lora_B|lora_down|lora_up|lora\.down|lora\.up)(?:\.\w+)?\.weight|alpha)")
_DOWN = ("lora_A", "lora_down", "lora.down")
_PARTS = "known are X.lora_A.weight with X.lora_B.weight, X.lora_down.weight with X.lora_up.weight, and X.alpha"
_PREFIXES = ("", *(f"{name}_" for name in ("lora_unet", "lora_transformer", "unet", "transformer", "diffusion_model")))
_SAYS = ("modelspec.architecture", "ss_base_model_version")  # what trainers write about the network, for the reader
# Names that others gave the layers of a network, with underscores, and those that they have here; by class.
# fmt: off
_NAMES: Mapping[str, KeyMap] = {
    "UNet3D": KeyMap("", (
        rename(r"add_embedding_linear_1", "text_embedding_0"),
        rename(r"add_embedding_linear_2", "text_embedding_2"),
    )),
    "WanTransformer3DModel": KeyMap("", (
        rename(r"blocks_(\d+)_self_attn_([qkv])", r"blocks_\1_attn1_to_\2"),
        rename(r"blocks_(\d+)_self_attn_o", r"blocks_\1_attn1_to_out_0"),
        rename(r"blocks_(\d+)_cross_attn_([qkv])", r"blocks_\1_attn2_to_\2"),
        rename(r"blocks_(\d+)_cross_attn_o", r"blocks_\1_attn2_to_out_0"),
        rename(r"blocks_(\d+)_ffn_0", r"blocks_\1_ffn_net_0_proj"),
        rename(r"blocks_(\d+)_ffn_2", r"blocks_\1_ffn_net_2"),
        rename(r"(text|time)_embedding_0", r"condition_embedder_\1_embedder_linear_1"),
        rename(r"(text|time)_embedding_2", r"condition_embedder_\1_embedder_linear_2"),
        rename(r"time_projection_1", "condition_embedder_time_proj"),
        rename(r"head_head", "proj_out"),
    )),
    "LTXVideoTransformer3DModel": KeyMap("", (
        rename(r"patchify_proj", "proj_in"),
        rename(r"adaln_single_(.+)", r"time_embed_\1"),
    )),
}
# fmt: on
"""Stable Video Diffusion as in diffusers; Wan and LTX as their authors published them."""


class Pair(NamedTuple):
    """What changes one layer: names of tensors in the file, and the factor where no tensor `alpha` gives it."""

    down: str
    up: str
    alpha: str
    scale: float


class _Network(NamedTuple):
    """A network on the disk: its class, its tensors with the files they are in, its layers by flat name."""

    kind: str
    tensors: dict[str, tuple[Path, Row]]
    layers: dict[str, str]


def read(path: Path) -> dict[str, Pair]:
    """Return what a file changes, by the names that it gives the layers.

    Raises:
        WeightsError: the file is missing, no safetensors file, or a tensor in it is no part of a LoRA.
    """
    return _read(path, files.stamp(path))[0]


@lru_cache(maxsize=16)
def _read(path: Path, _stamp: object) -> tuple[dict[str, Pair], dict[str, Row]]:
    try:
        metadata, index = header.read_index(path)
    except WeightsError as error:
        hint = "a LoRA is a .safetensors file; pickled ones (.pt, .bin, .ckpt) are never opened"
        raise WeightsError(error.message, hint) from None
    found: dict[str, dict[str, str]] = {}
    for key, row in index.items():
        match = _KEY.fullmatch(key)
        part = None if match is None else "alpha" if match[2] is None else "down" if match[2] in _DOWN else "up"
        if match is None or part is None or row.dtype not in ("F64", "F32", "F16", "BF16"):
            raise WeightsError(f"{path}: {key!r} ({row.dtype}) is no part of a LoRA", _PARTS)
        if found.setdefault(match[1], {}).setdefault(part, key) != key:
            raise WeightsError(f"{path}: {key!r} says the same as {found[match[1]][part]!r}", _PARTS)
        if part == "alpha" and math.prod(row.shape) != 1:
            raise WeightsError(f"{path}: {key!r} has shape {list(row.shape)}, it must be one number")
    told, pairs = _told(path, metadata), dict[str, Pair]()
    for name, parts in found.items():
        if absent := {"down", "up"} - set(parts):
            raise WeightsError(f"{path}: {next(iter(parts.values()))!r} has no {max(absent)!r} beside it", _PARTS)
        rank = (*index[parts["down"]].shape, 0)[0]
        if not rank:
            raise WeightsError(f"{path}: {parts['down']!r} is empty")
        pairs[name] = Pair(parts["down"], parts["up"], parts.get("alpha", ""), _scale(path, told, name, rank))
    if not pairs:
        raise WeightsError(f"{path} is empty", _PARTS)
    return pairs, index


def _told(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of the trainer that diffusers keeps in the header, by dotted key; empty where none are."""
    try:
        told = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        if not isinstance(told, dict):
            raise ValueError("no table")
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path} has damaged metadata: {error}") from None
    return told


def _scale(path: Path, told: Mapping[str, Any], name: str, rank: int) -> float:
    """Return alpha / r of a layer, or alpha / sqrt(r) where it was trained so (arXiv 2312.03732)."""
    model, _, layer = name.partition(".")
    listed = told.get(f"{model}.alpha_pattern")
    patterns: dict[str, Any] = listed if isinstance(listed, dict) else {}
    own = [patterns[key] for key in patterns if f".{layer}".endswith(f".{key.removeprefix('^')}")]
    alpha = own[0] if own else told.get(f"{model}.lora_alpha", rank)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise WeightsError(f"{path} has damaged metadata: lora_alpha is {alpha!r}")
    return alpha / (math.sqrt(rank) if told.get(f"{model}.use_rslora") else rank)


@lru_cache(maxsize=8)
def _network(place: Path, _stamps: object) -> _Network:
    if place.is_dir():
        kind = str(folders.sizes(place.parent, place.name).get("_class_name", ""))
        parts = {path: header.read_index(path)[1] for path in _stored(place)}
    else:
        metadata, parts = header.read_parts(place)
        kind = header.read_metadata(place, metadata)[0]
    tensors = {key: (path, row) for path, index in parts.items() for key, row in index.items()}
    matrices = [key for key, (_, row) in tensors.items() if key.endswith(".weight") and len(row.shape) > 1]
    return _Network(kind, tensors, {_flat(key.removesuffix(".weight")): key for key in matrices})


def _stored(place: Path) -> list[Path]:
    """Return the files of a network of a pipeline, of 16 bit where both are there, as they are loaded."""
    return sorted(place.glob("*.fp16*.safetensors")) or sorted(place.glob("*.safetensors"))


def _opened(place: Path) -> _Network:
    stamps = [files.stamp(path) for path in (_stored(place) if place.is_dir() else (place, header.shard_index(place)))]
    return _network(place, tuple(stamps))


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _layer(network: _Network, name: str) -> str | None:
    """Return the tensor that a name in a file means, None if there is none."""
    names = [_flat(name).removeprefix(prefix) for prefix in _PREFIXES if _flat(name).startswith(prefix)]
    renamed = (known.rename(flat) for flat in names if (known := _NAMES.get(network.kind)))
    names += [target for found in renamed if found for target in found[0]]
    return next((network.layers[flat] for flat in names if flat in network.layers), None)


def _bare(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape less the ones at its end: a convolution of size 1 is a linear layer."""
    return _bare(shape[:-1]) if len(shape) > 1 and shape[-1] == 1 else tuple(shape)


def fit(path: Path, place: Path) -> dict[str, Pair]:
    """Return what a file changes, by the tensors of a network: a weights file of ours, or a folder of a pipeline.

    Raises:
        WeightsError: see `read`; or the first tensor that fits no layer, and how many do.
    """
    (pairs, index), network = _read(path, files.stamp(path)), _opened(place)
    found: dict[str, Pair] = {}
    wrong: list[str] = []
    for name, pair in pairs.items():
        key = _layer(network, name)
        if key is None or key in found:
            said = f"no layer of {network.kind}" if key is None else f"the same layer as {found[key].down!r}"
            wrong.append(f"{pair.down!r} fits {said}")
            continue
        shape, rank = network.tensors[key][1].shape, index[pair.down].shape[0]
        wanted = {pair.down: (rank, *shape[1:]), pair.up: (shape[0], rank)}
        odd = [part for part, needed in wanted.items() if _bare(index[part].shape) != _bare(needed)]
        wrong += [f"{part!r} has shape {list(index[part].shape)}, {key} takes {list(wanted[part])}" for part in odd[:1]]
        found[key] = pair
    if wrong:
        raise WeightsError(f"{path}: {wrong[0]}; {len(pairs) - len(wrong)} of its {len(pairs)} layers fit")
    return found


def assign(given: Sequence[Given], networks: Mapping[str, Path]) -> dict[Path, tuple[Given, ...]]:
    """Return which files go into which networks, each into all that it fits.

    Args:
        given: files with their strengths.
        networks: files or folders of networks, by the name of their model.

    Raises:
        WeightsError: a file that fits none of them, by what does not fit the first, and what it does fit.
    """
    found: dict[Path, tuple[Given, ...]] = {}
    for one in given:
        problems = list[WeightsError]()
        for place in networks.values():
            try:
                fit(one[0], place)
                found[place] = (*found.get(place, ()), one)
            except WeightsError as error:
                problems.append(error)
        if len(problems) == len(networks):
            raise WeightsError(problems[0].message, f"{_known(one[0])}; this run draws by {', '.join(networks)}")
    return found


def _known(path: Path) -> str:
    """Say which models that are here a file fits, else what it says of itself."""
    families = catalog.families().items()
    places = {name: family.path("stream.unet") for name, family in families if family.has("stream.unet")}
    streaming = [name for name, row in catalog.pipelines().items() if "preset" in row]
    places |= {name: folders.place(folder, "transformer") for name in streaming if (folder := folders.here(name))}
    fitting = list[str]()
    for name, place in places.items():
        with suppress(WeightsError):  # also where it is not here
            fit(path, place)
            fitting.append(name)
    metadata, _ = header.read_index(path)
    said = [metadata[key] for key in _SAYS if key in metadata]
    own = f", and says it is for {said[0][:60]!r}" if said else ""
    return f"it fits {', '.join(fitting)}" if fitting else f"it fits no model that is here{own}"


def merge(network: torch.nn.Module, place: Path, given: Sequence[Given]) -> None:
    """Add files to the parameters of a network, in 32 bit from its stored weights, before these are rounded.

    Args:
        network: as loaded from `place`, on any device and in any precision.
        place: its weights file, or its folder in a pipeline.
        given: files with their strengths; one of 0 changes nothing.

    Raises:
        WeightsError: see `fit`; or a file holds values that are not finite.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    stored, parameters = _opened(place), dict(network.named_parameters())
    changes: dict[str, list[tuple[Path, Pair, float]]] = {}
    for path, strength in given:
        for key, pair in fit(path, place).items() if strength else ():
            changes.setdefault(key, []).append((path, pair, strength))
    with ExitStack() as stack, torch.no_grad():
        opened: dict[Path, Any] = {}

        def tensor(path: Path, key: str, device: torch.device) -> torch.Tensor:
            try:
                if path not in opened:
                    opened[path] = stack.enter_context(safe_open(path, "pt"))
                with signals_wait():  # torch would turn a signal into a ValueError
                    values: torch.Tensor = opened[path].get_tensor(key)
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{path} cannot be read: {error}") from error
            return values.to(device, torch.float32)

        for key, pairs in changes.items():
            parameter = parameters[key]
            weights = tensor(stored.tensors[key][0], key, parameter.device)
            for path, pair, strength in pairs:
                down, up = (tensor(path, part, parameter.device).flatten(1) for part in (pair.down, pair.up))
                scale = pair.scale
                if pair.alpha:
                    scale = float(tensor(path, pair.alpha, torch.device("cpu"))) / len(down)
                change = strength * scale * (up @ down).view_as(weights)
                if not torch.isfinite(change).all():
                    raise WeightsError(f"{path}: {pair.down!r} with its other half is not finite", "it is damaged")
                weights = weights + change  # not in place: the file may be mapped
            parameter.copy_(weights)
