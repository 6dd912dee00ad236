"""The inventory: what is missing or of another size is named."""

from pathlib import Path

import pytest

from streamt2v.errors import WeightsError
from streamt2v.weights import catalog, inventory


def test_absent_files_and_other_sizes_are_named(root: Path) -> None:
    chosen = catalog.family("tiny", root)
    assert inventory.missing(chosen) == []
    inventory.verify(chosen)
    assert inventory.default_family(root=root) == "tiny"
    (root / "tiny" / "tokenizer.json").unlink()
    with chosen.path("stream.apm").open("ab") as stream:
        stream.write(b"more")
    first, second = inventory.missing(chosen)
    assert "apm.safetensors has" in first
    assert "tokenizer.json is missing" in second
    for refuse in (inventory.require, inventory.verify):
        with pytest.raises(WeightsError, match=r"apm\.safetensors has .* \(and 1 more\)"):
            refuse(chosen)
    assert inventory.default_family(root=root) == "tiny"  # the last one is named even so, and then says what it lacks


@pytest.mark.weights("demo")
def test_the_shipped_demo_is_whole_and_small() -> None:
    demo = catalog.family("demo")
    inventory.verify(demo)
    assert demo.num_bytes <= 40e6


@pytest.mark.parametrize(
    ("kind", "name"), [("cpu", "demo"), ("cuda", "streamingt2v"), ("mps", "streamingt2v"), (None, "streamingt2v")]
)
def test_the_default_family_fits_the_device(kind: str | None, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Billions of parameters are not for a CPU, even where their files are here; of a cluster nothing is known."""
    monkeypatch.setattr(inventory, "missing", lambda family, *_: [])
    assert inventory.default_family(kind) == name
    assert inventory.fits(catalog.family("demo"), "cpu")


def test_what_is_here_counts_more_than_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "missing", lambda family, *_: [] if family.name == "demo" else ["all"])
    assert inventory.default_family("cuda") == "demo"
