"""LoRA: what a file changes is found by names alone, checked by headers alone, and merged as by hand."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v import weights
from streamt2v.errors import WeightsError
from streamt2v.models.unet3d import TextContext, UNet3D, UNet3DConfig
from streamt2v.weights import lora, networks
from tests import checkpoints, loras, pipelines

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
]

SIZES: dict[str, dict[str, Any]] = {
    "streamingt2v": checkpoints.SMALL["stream/unet"],
    "streamingsvd": checkpoints.SVD_UNET | {
        "block_out_channels": [16, 32], "attention_levels": [True, False], "layers_per_block": 1, "norm_num_groups": 8,
        "attention_head_dim": 8,
    },
}  # fmt: skip
TRANSFORMERS: dict[str, Callable[[], Any]] = {
    "wan": pipelines.wan_transformer,
    "ltx": lambda: pipelines.ltx_parts()["transformer"],
    "helios": lambda: pipelines.helios_parts(pyramid=False)["transformer"],
}


def stored(root: Path, name: str) -> Path:
    """Where a small random network lies: a file of ours or the folder of a transformer."""
    torch.manual_seed(0)
    if name in TRANSFORMERS:
        TRANSFORMERS[name]().save_pretrained(root / name / "transformer")
        return root / name / "transformer"
    path = root / name / "unet.safetensors"
    network = UNet3D(UNet3DConfig.from_dict(SIZES[name]))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    networks.save_module(path, network)
    return path


def load(place: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The network of a place, as a run loads it."""
    if place.is_file():
        return weights.load_module(place, "cpu", dtype)
    from streamt2v.families.diffusers_pipelines import load_network

    kind = json.loads((place / "config.json").read_text("utf-8"))["_class_name"]
    import diffusers

    network: torch.nn.Module = load_network(getattr(diffusers, kind), place, dtype)
    return network


def shapes(place: Path) -> dict[str, tuple[int, ...]]:
    return dict(networks.shapes(load(place)))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("networks")
    return {name: stored(root, name) for name in (*SIZES, *TRANSFORMERS)}


@pytest.fixture(scope="module")
def unet(places: dict[str, Path]) -> Path:
    return places["streamingt2v"]


def far(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).abs().max())


LAYOUTS = [
    *(("wan", naming, "") for naming in loras.NAMINGS),
    *((name, naming, "") for name in ("ltx", "helios") for naming in ("transformer", "kohya")),
    ("streamingt2v", "kohya", ""),
    ("streamingsvd", "unet", ""),
    *((name, naming, name) for name in ("wan", "ltx") for naming in ("comfy", "kohya")),
]


@pytest.mark.parametrize(("name", "naming", "published"), LAYOUTS)
def test_every_layer_in_every_layout_is_merged_as_by_hand(
    name: str, naming: str, published: str, places: dict[str, Path], tmp_path: Path
) -> None:
    network = load(places[name])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    path = loras.written(
        tmp_path / "lora.safetensors", loras.tensors(shapes(places[name]), naming, published=published)
    )
    assert len(lora.fit(path, places[name])) == len(loras.layers(shapes(places[name]))) > 15
    lora.merge(network, places[name], [(path, 0.5)])
    wanted = loras.by_hand(before, 0.5)
    assert max(far(value, wanted[key]) for key, value in network.state_dict().items()) < 1e-6
    changed = {key for key, value in network.state_dict().items() if far(value, before[key]) > 0.01}
    assert changed == {f"{layer}.weight" for layer in loras.layers(shapes(places[name]))}


def test_the_library_names_two_layers_of_svd_otherwise(places: dict[str, Path], tmp_path: Path) -> None:
    place, names = places["streamingsvd"], {"text_embedding.0": "linear_1", "text_embedding.2": "linear_2"}
    values = loras.tensors(shapes(place), only=names)
    renamed = {key.replace(name, f"unet.add_embedding.{names[name]}"): value
               for key, value in values.items() for name in names if key.startswith(name)}  # fmt: skip
    path = loras.written(tmp_path / "lora.safetensors", renamed)
    assert set(lora.fit(path, place)) == {f"{name}.weight" for name in names}


def text_of(network: UNet3D) -> TextContext:
    config = network.config
    return TextContext(
        torch.linspace(-1, 1, 2 * config.text_tokens * config.cross_attention_dim).view(2, config.text_tokens, -1)
    )


@torch.inference_mode()
def test_the_output_is_that_of_weights_merged_by_hand(places: dict[str, Path], tmp_path: Path) -> None:
    outputs: dict[str, Callable[[Any], Tensor]] = {
        "streamingt2v": lambda net: net(torch.ones(2, 4, 3, 8, 8), 500, net.prepare(text_of(net))),
        "wan": lambda net: (
            net(torch.ones(1, 8, 2, 4, 4), torch.tensor([500]), torch.ones(1, 5, pipelines.WIDTH)).sample
        ),
    }
    for name, run in outputs.items():
        network, other = load(places[name]), load(places[name])
        plain = run(network)
        path = loras.written(tmp_path / f"{name}.safetensors", loras.tensors(shapes(places[name])))
        other.load_state_dict(loras.by_hand(network.state_dict(), 0.2))
        lora.merge(network, places[name], [(path, 0.2)])
        assert far(run(network), run(other)) < 1e-5
        assert far(run(network), plain) > 1e-3


def test_strength_0_changes_no_bit(unet: Path, tmp_path: Path) -> None:
    network, plain = load(unet), load(unet).state_dict()
    lora.merge(network, unet, [(loras.written(tmp_path / "lora.safetensors", loras.tensors(shapes(unet))), 0.0)])
    assert all(torch.equal(value, plain[key]) for key, value in network.state_dict().items())


def test_weights_are_rounded_after_the_merge(places: dict[str, Path], tmp_path: Path) -> None:
    place = places["wan"]
    path = loras.written(tmp_path / "lora.safetensors", loras.tensors(shapes(place)))
    exact, rounded, twice = load(place), load(place, torch.bfloat16), load(place, torch.bfloat16)
    given = [(path, 0.01)]
    lora.merge(exact, place, given)
    lora.merge(rounded, place, given)
    changes = loras.by_hand({key: torch.zeros_like(value) for key, value in exact.state_dict().items()}, 0.01)
    differ = False
    for key, value in rounded.named_parameters():
        wanted = exact.state_dict()[key]
        assert torch.equal(value, wanted.to(value.dtype)), key
        differ |= not torch.equal(value, (twice.state_dict()[key] + changes[key]).to(value.dtype))
    assert differ  # from what comes of weights that were rounded before


sizes = st.integers(1, 6)


@given(
    shape=st.one_of(st.tuples(sizes, sizes), st.tuples(sizes, sizes, st.sampled_from((1, 3)), st.sampled_from((1, 3)))),
    rank=sizes, alpha=st.floats(-8, 8), strength=st.floats(-10, 10), flat=st.booleans(),
)  # fmt: skip
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_rank_alpha_and_strength(
    shape: tuple[int, ...], rank: int, alpha: float, strength: float, flat: bool, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a convolution of size 1 the file may hold a linear layer."""
    layer = torch.nn.Linear(shape[1], shape[0]) if len(shape) == 2 else torch.nn.Conv2d(shape[1], shape[0], shape[2:])
    network, place = torch.nn.ModuleDict({"layer": layer}), tmp_path / "net"
    place.mkdir(exist_ok=True)
    (place / "config.json").write_text('{"_class_name": "Any"}')
    loras.written(place / "net.safetensors", network.state_dict())
    before = layer.weight.detach().clone()
    linear = len(shape) == 2 or (flat and shape[2:] == (1, 1))
    down = torch.randn(rank, shape[1], *(() if linear else shape[2:]))
    up = torch.randn(shape[0], rank, *(() if linear else (1, 1)))
    values = {"layer.lora_down.weight": down, "layer.lora_up.weight": up, "layer.alpha": torch.tensor(alpha).double()}
    lora.merge(network, place, [(loras.written(tmp_path / "lora.safetensors", values), strength)])
    wanted = before.clone().double()
    for index in range(rank):
        column, row = up[:, index].double().flatten(), down[index].double().flatten()
        wanted += (strength * alpha / rank * column[:, None] * row).view(shape)
    assert far(layer.weight.detach(), wanted) < 1e-4


@pytest.mark.parametrize(
    ("told", "alpha"),
    [
        ({}, 3), ({"unet.lora_alpha": 6, "unet.r": 3}, 6),
        ({"unet.lora_alpha": 6, "unet.use_rslora": True}, 6 * math.sqrt(3)),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"mid_block.attentions.0.proj_in": 1.5}}, 1.5),
        ({"unet.lora_alpha": 6, "unet.alpha_pattern": {"^proj_out": 1.5}}, 6), ({"other.lora_alpha": 6}, 3),
    ],
)  # fmt: skip
def test_alpha_may_be_told_in_the_header(told: dict[str, Any], alpha: float, unet: Path, tmp_path: Path) -> None:
    """Where the file says nothing it is the rank."""
    name = "mid_block.attentions.0.proj_in"
    values = loras.tensors(shapes(unet), "unet", [name], alpha=False)
    path = loras.written(tmp_path / "lora.safetensors", values, {"lora_adapter_metadata": json.dumps(told)})
    assert lora.fit(path, unet)[f"{name}.weight"].scale == pytest.approx(alpha / 3)


LAYER = "mid_block.attentions.0.proj_in"
HALF, OTHER = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
TEXT = "lora_te_text_model_encoder_layers_0_mlp_fc1"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({HALF: None}, f"'{LAYER}.alpha' has no 'down' beside it"),
        ({OTHER: None, f"{LAYER}.alpha": None}, f"'{HALF}' has no 'up' beside it"),
        ({"nowhere.lora_A.weight": torch.ones(3, 2), "nowhere.lora_B.weight": torch.ones(2, 3)},
         "'nowhere.lora_A.weight' fits no layer of UNet3D; 1 of its 2 layers fit"),
        ({f"{TEXT}.lora_down.weight": torch.ones(3, 2), f"{TEXT}.lora_up.weight": torch.ones(2, 3)}, "fits no layer"),
        ({HALF: torch.ones(3, 7)}, f"'{HALF}' has shape [3, 7], {LAYER}.weight takes [3, 32]; 0 of its 1 layers fit"),
        ({OTHER: torch.ones(32, 4)}, f"'{OTHER}' has shape [32, 4], {LAYER}.weight takes [32, 3]"),
        ({HALF: torch.ones(0, 32)}, "is empty"),
        ({HALF: torch.ones(3, 32, dtype=torch.int8)}, "(I8) is no part of a LoRA"),
        ({f"{LAYER}.alpha": torch.ones(2)}, "must be one number"),
        ({f"{LAYER}.dora_scale": torch.ones(2)}, f"'{LAYER}.dora_scale' (F32) is no part of a LoRA"),
        ({f"{LAYER}.weight": torch.ones(2)}, "is no part of a LoRA"),
        ({f"unet.{HALF}": torch.ones(3, 32), f"unet.{OTHER}": torch.ones(32, 3)}, "fits the same layer as"),
        ({HALF.replace("A.", "A.b."): torch.ones(3, 32)}, "says the same as"),
        ({HALF: None, OTHER: None, f"{LAYER}.alpha": None}, "is empty"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit_is_refused_by_its_header(
    change: dict[str, Tensor | None], said: str, unet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Tensor | None] = {**loras.tensors(shapes(unet), only=[LAYER]), **change}
    path = loras.written(
        tmp_path / "lora.safetensors", {key: value for key, value in values.items() if value is not None}
    )
    monkeypatch.setattr("safetensors.safe_open", None)
    with pytest.raises(WeightsError, match=re.escape(said)):
        lora.fit(path, unet)


@pytest.mark.parametrize("told", ["{", "[]", '{"unet.lora_alpha": "6"}', '{"unet.lora_alpha": NaN}'])
def test_damaged_metadata_is_refused(told: str, unet: Path, tmp_path: Path) -> None:
    values = loras.tensors(shapes(unet), "unet", [LAYER], alpha=False)
    path = loras.written(tmp_path / "lora.safetensors", values, {"lora_adapter_metadata": told})
    with pytest.raises(WeightsError, match="damaged metadata"):
        lora.read(path)


def test_only_safetensors_are_read(unet: Path, tmp_path: Path) -> None:
    values = loras.tensors(shapes(unet), only=[LAYER])
    torch.save(values, tmp_path / "lora.pt")
    whole = loras.written(tmp_path / "lora.safetensors", values).read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-1])
    for name, said in {
        "lora.pt": "is not a safetensors file",
        "cut.safetensors": "is truncated",
        "no": "No such",
    }.items():
        with pytest.raises(WeightsError, match=said) as refused:
            lora.read(tmp_path / name)
        assert "pickled ones (.pt, .bin, .ckpt) are never opened" in refused.value.hint


def test_values_that_are_not_finite_are_refused(unet: Path, tmp_path: Path) -> None:
    network = load(unet)
    for key, value in {HALF: torch.full((3, 32), math.nan), f"{LAYER}.alpha": torch.tensor(math.inf)}.items():
        values = loras.tensors(shapes(unet), only=[LAYER]) | {key: value}
        with pytest.raises(WeightsError, match="not finite"):
            lora.merge(network, unet, [(loras.written(tmp_path / "lora.safetensors", values), 1.0)])


def test_each_file_goes_into_all_that_it_fits(places: dict[str, Path], tmp_path: Path) -> None:
    unet, wan = places["streamingt2v"], places["wan"]
    both = {"demo": unet, "wan": wan}
    one, other = (
        (loras.written(tmp_path / f"{place.name}.safetensors", loras.tensors(shapes(place))), 0.5)
        for place in (unet, wan)
    )
    assert lora.assign([one, other], both) == {unet: (one,), wan: (other,)}
    assert lora.assign([one, one], {"a": unet, "b": unet}) == {unet: (one, one, one, one)}
    with pytest.raises(WeightsError, match=r"'blocks\.0.*' fits no layer of UNet3D; 0 of its 17") as refused:
        lora.assign([other], {"demo": unet})
    assert refused.value.hint == "it fits no model that is here; this run draws by demo"


def test_it_is_said_what_a_file_does_fit(places: dict[str, Path], tmp_path: Path) -> None:
    demo = weights.family("demo").path("stream.unet")
    path = loras.written(tmp_path / "demo.safetensors", loras.tensors(shapes(demo), "kohya", [LAYER]))
    with pytest.raises(WeightsError) as refused:
        lora.assign([(path, 1.0)], {"wan": places["wan"]})
    assert refused.value.hint == "it fits demo; this run draws by wan"
    values = {"lora_unet_a.lora_down.weight": torch.ones(2, 2), "lora_unet_a.lora_up.weight": torch.ones(2, 2)}
    path = loras.written(tmp_path / "other.safetensors", values, {"modelspec.architecture": "flux-1-dev/lora"})
    with pytest.raises(WeightsError) as refused:
        lora.assign([(path, 1.0)], {"wan": places["wan"]})
    assert "it fits no model that is here, and says it is for 'flux-1-dev/lora'" in refused.value.hint


def test_no_two_layers_have_the_same_flat_name(places: dict[str, Path]) -> None:
    for place in (*places.values(), *(weights.family("demo").path(role) for role in ("stream.unet", "refine.unet"))):
        names = loras.layers({key: row.shape for key, (_, row) in lora._opened(place).tensors.items()})
        assert len({name.replace(".", "_") for name in names}) == len(names) == len(lora._opened(place).layers)
