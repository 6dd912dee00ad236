"""Weights files to networks and back: built without memory for the parameters, then given exactly the file's tensors.

A tensor that is missing, extra or of another shape is an error before it reaches a network. Torch and the model
libraries are imported when a file is loaded, not with this module.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamt2v import files
from streamt2v.errors import ConfigError, OutputError, WeightsError, signals_wait
from streamt2v.weights import header, inventory
from streamt2v.weights.catalog import Family
from streamt2v.weights.tokenizer import load_tokenizer

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]
# class name -> (its module, its config class there); "" if it is configured by keyword arguments
NETWORKS: Mapping[str, tuple[str, str]] = {
    "UNet3D": ("streamt2v.models.unet3d", "UNet3DConfig"),
    "SpacetimeTransformer": ("streamt2v.models.dit", "SpacetimeConfig"),
    "EmbeddingPrior": ("streamt2v.models.prior", "PriorConfig"),
    "Restorer": ("streamt2v.models.restorer", "RestorerConfig"),
    "PixelCodec": ("streamt2v.models.restorer", "PixelCodecConfig"),
    "Interpolator": ("streamt2v.models.interpolator", "InterpolatorConfig"),
    "ConditionalAttention": ("streamt2v.models.cam", "CamConfig"),
    "AppearanceTokens": ("streamt2v.models.apm", ""),
    "AutoencoderKL": ("streamt2v.models.vae", "AutoencoderConfig"),
    "AutoencoderKLTemporalDecoder": ("diffusers.models.autoencoders.autoencoder_kl_temporal_decoder", ""),
    "CLIPTextModel": ("streamt2v.models.clip", "CLIPTextConfig"),
    "CLIPTextModelWithProjection": ("streamt2v.models.clip", "CLIPTextConfig"),
    "CLIPVisionModelWithProjection": ("streamt2v.models.clip", "CLIPVisionConfig"),
}


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """Return the arguments that rebuild `module`: its dataclass, or the public part of a library's config."""
    config: Any = module.config
    if hasattr(config, "to_diff_dict"):  # transformers: leave out the defaults that all its configs share
        from transformers import PretrainedConfig

        usual = PretrainedConfig().to_dict() | {"model_type": config.model_type, "architectures": config.architectures}
        return {key: value for key, value in config.to_dict().items() if usual.get(key, config) != value}
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    return {key: value for key, value in dict(config).items() if not key.startswith("_")}  # diffusers


def save_module(path: Path, module: torch.nn.Module, schedule: Mapping[str, Any] | None = None) -> None:
    """Write a network in 16 bit with everything needed to rebuild it; the file appears complete or not at all.

    Args:
        path: the safetensors file to write; its folder is created.
        module: a network of one of the classes of `NETWORKS`.
        schedule: noise schedule of a denoiser, ready for JSON.

    Raises:
        WeightsError: the class is unknown, its `config` describes another network, or a value overflows in 16 bit.
        OutputError: the file cannot be written.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    name = type(module).__name__
    _network(name, path)
    tensors = {}
    for key, value in module.state_dict().items():
        kind = torch.float16 if value.is_floating_point() else value.dtype
        tensor = value.detach().to("cpu", kind).contiguous().clone()
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{key} of {name} has values that are not finite in 16 bit: not saved")
        tensors[key] = tensor
    arguments = config_of(module)
    rebuilt = build(path, name, json.loads(json.dumps(arguments)))
    _check_keys(path, name, shapes(rebuilt), shapes(module))
    metadata = header.metadata_of(name, arguments, schedule)
    files.make_directory(path.parent)
    with files.replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(0o644)  # the library makes files readable for their owner only
        except SafetensorError as error:  # a full disk, among others
            raise OutputError(f"cannot write {path}: {error}", "free some space") from error


def _network(name: str, path: Path) -> tuple[str, str]:
    if name not in NETWORKS:
        raise WeightsError(f"{path} holds a network of unknown class {name!r}", f"known: {', '.join(NETWORKS)}")
    return NETWORKS[name]


def quiet(package: str) -> None:
    """Silence a model library while it loads: our own checks are stricter than its warnings."""
    logging = importlib.import_module(f"{package}.utils.logging")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def build(path: Path, name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """Build a network without memory for its parameters; constant buffers are computed as usual.

    On a plain meta device, buffers that no file stores (position numbers, frequency tables) would be lost. Every layer
    allocates its parameters with `torch.empty`, so only this call is redirected to the meta device.

    Args:
        path: the file that describes the network, named in errors.
        name: a class of `NETWORKS`.
        config: its arguments.

    Raises:
        WeightsError: the class is unknown, or does not take these arguments.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    random = (torch.Tensor.normal_, torch.Tensor.uniform_)

    class ParametersOnMeta(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            named = dict(kwargs or {})
            if func in random or getattr(func, "__module__", "") == "torch.nn.init":
                filled = args[0] if args else named["tensor"]
                if filled.is_meta:  # torch would import sympy (1.4 s) to fill nothing
                    return filled
            if func is torch.empty and named.get("device") is None:
                named["device"] = "meta"
            return func(*args, **named)

    module_name, config_class = _network(name, path)
    if (package := module_name.partition(".")[0]) != "streamt2v":
        quiet(package)
    module: Any = importlib.import_module(module_name)
    network: Callable[..., torch.nn.Module] = getattr(module, name)
    arguments = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    try:
        built = getattr(module, config_class).from_dict(dict(config)) if config_class else None
        with ParametersOnMeta():
            return network(**arguments) if built is None else network(built)
    except (TypeError, ValueError, KeyError, ConfigError) as error:
        raise WeightsError(f"{path} does not describe a {name}: {error}") from error


def load_module(path: Path, device: str | torch.device, dtype: torch.dtype) -> torch.nn.Module:
    """Build the network that a weights file describes, and give it exactly the file's tensors.

    Returns the network in evaluation mode with gradients off (training turns both back on).

    Args:
        path: a file written by `save_module`; for a split network, the name it would have in one piece.
        device: where the tensors go.
        dtype: type of all floating-point tensors.

    Raises:
        WeightsError: the file is missing, damaged, of an unknown class, or its tensors are not exactly the network's.
    """
    metadata, parts = header.read_parts(path)
    name, config, _ = header.read_metadata(path, metadata)
    module = build(path, name, config)
    wanted = shapes(module)
    _check_keys(path, name, wanted, {key: row.shape for index in parts.values() for key, row in index.items()})

    from safetensors import SafetensorError, safe_open

    converted: dict[str, torch.Tensor] = {}
    for part, index in parts.items():
        try:
            with safe_open(part, "pt", str(device)) as file:
                for key in index:
                    with signals_wait():  # torch would turn a signal into a ValueError
                        tensor = file.get_tensor(key)
                    converted[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"{part} cannot be read: {error}", "run `streamt2v weights verify`") from error
    return furnish(module, {key: converted[key] for key in wanted}, device)


def furnish(
    module: torch.nn.Module, tensors: Mapping[str, torch.Tensor], device: str | torch.device
) -> torch.nn.Module:
    """Give a network from `build` its tensors; evaluation mode, gradients off.

    Raises:
        WeightsError: a buffer is left without values.
    """
    module.load_state_dict(tensors, strict=True, assign=True)
    for key, buffer in module.named_buffers():
        if buffer.is_meta:
            name = type(module).__name__
            raise WeightsError(f"{name} has a buffer {key!r} that no file fills: this is a bug of the network")
    return module.to(device).requires_grad_(False).eval()


def shapes(network: torch.nn.Module) -> Shapes:
    """Return the shapes of all tensors of a network by name."""
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


def _check_keys(path: Path, name: str, wanted: Shapes, found: Shapes) -> None:
    hint = "it belongs to another version or is damaged: run `streamt2v weights verify`"
    for key, shape in wanted.items():
        if key not in found:
            raise WeightsError(f"{path} lacks the tensor {key!r} of {name}", hint)
        if found[key] != shape:
            raise WeightsError(f"{path}: {key!r} has shape {list(found[key])}, {name} needs {list(shape)}", hint)
    for key in found:
        if key not in wanted:
            raise WeightsError(f"{path} has a tensor {key!r} that {name} does not know", hint)


def load(chosen: Family, role: str, device: str | torch.device, dtype: torch.dtype) -> Any:
    """Load the network (or, for a ".tokenizer" role, the tokenizer) that plays `role` in a family.

    Raises:
        WeightsError: the family has no such role, the file's SHA-256 is not the recorded one, or it does not load
            (see `load_module`).
    """
    path, row = chosen.path(role), chosen.file(role)
    inventory.require_unchanged(chosen, row)
    return load_tokenizer(path, row.pad) if path.suffix == ".json" else load_module(path, device, dtype)
