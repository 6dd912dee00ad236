"""The catalog: families by name, and a list that is broken is refused."""

import tomllib
from pathlib import Path

import pytest

from streamt2v.errors import ConfigError, WeightsError
from streamt2v.weights import catalog
from tests.weights.conftest import MANIFEST


def test_recording_keeps_comments_and_everything_else(root: Path) -> None:
    text = (root / "weights.toml").read_text()
    assert text.startswith(MANIFEST.partition("[[files]]")[0])
    before, after = tomllib.loads(MANIFEST), tomllib.loads(text)
    assert all(len(row["sha256"]) == 64 and row["bytes"] > 0 for row in after["files"])
    for row in before["files"] + after["files"]:
        del row["sha256"], row["bytes"]
    assert before == after
    assert catalog.record(root) == []
    assert (root / "weights.toml").read_text() == text


def test_unknown_models_name_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no model 'dmeo'") as caught:
        catalog.family("dmeo")
    assert "did you mean 'demo'?" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        catalog.family("completely-different")
    assert "demo" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("schema = 1", "schema = 2", "schema 2"),
        ('preset = "demo"', "", "'preset'"),
        ('path = "tiny/tokenizer.json"', 'path = "tiny/other.json"', "tokenizer.json"),
        ('"tiny/tokenizer.json"', '"../secret.json"', "outside"),
        ('"tiny/tokenizer.json"', '"/etc/passwd"', "outside"),
        ("bytes = 0", "size = 0", "size"),
        ("[[files]]", "[[files", "cannot be used"),
    ],
)
def test_a_broken_list_is_refused(tmp_path: Path, old: str, new: str, said: str) -> None:
    (tmp_path / "weights.toml").write_text(MANIFEST.replace(old, new))
    with pytest.raises(WeightsError, match=said):
        catalog.families(tmp_path)


def test_a_missing_list_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="list of weights is missing"):
        catalog.families(tmp_path / "nothing")


def test_the_shipped_list_is_sound() -> None:
    """Every listed family has a licence for each file, and each listed file has a user."""
    known = catalog.families()
    everything = known | catalog.helpers()
    used = {file.path for chosen in everything.values() for file in chosen.files}
    listed = tomllib.loads(catalog._manifest(catalog.PACKAGE).read_text())["files"]
    assert sorted(used) == sorted(row["path"] for row in listed)
    for chosen in known.values():
        assert (catalog.PACKAGE / "presets" / f"{chosen.preset}.toml").is_file()
        assert all(file.licence and file.what for file in chosen.files)
        stage = "refine" if chosen.refines_only else "stream"
        assert {f"{stage}.unet", f"{stage}.vae"} <= set(chosen.components)
        assert chosen.has("stream.text") == chosen.has("stream.tokenizer")
