"""The inventory: what is missing or of another size is named."""

from pathlib import Path

import pytest

from streamt2v.errors import WeightsError
from streamt2v.weights import catalog, inventory


def test_absent_files_and_other_sizes_are_named(root: Path) -> None:
    chosen = catalog.family("tiny", root)
    assert inventory.missing(chosen) == []
    inventory.verify(chosen)
    assert inventory.default_family(root) == "tiny"
    (root / "tiny" / "tokenizer.json").unlink()
    with chosen.path("stream.apm").open("ab") as stream:
        stream.write(b"more")
    first, second = inventory.missing(chosen)
    assert "apm.safetensors has" in first
    assert "tokenizer.json is missing" in second
    for refuse in (inventory.require, inventory.verify):
        with pytest.raises(WeightsError, match=r"apm\.safetensors has .* \(and 1 more\)"):
            refuse(chosen)
    assert inventory.default_family(root) == "tiny"  # the last one is named even so, and then says what it lacks


@pytest.mark.weights("demo")
def test_the_shipped_demo_is_whole_and_small() -> None:
    demo = catalog.family("demo")
    inventory.verify(demo)
    assert demo.num_bytes <= 40e6
