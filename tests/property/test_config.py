"""Config: flat and back, precedence, and errors that name the key."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v import config
from streamt2v.errors import ConfigError


def _values(spec: dict[str, Any]) -> st.SearchStrategy[Any]:
    choices = config.get_args(spec["type"])
    if choices:
        return st.sampled_from(choices)
    if spec["type"] is bool:
        return st.booleans()
    if spec["type"] is int:
        return st.integers(int(spec["low"]), min(int(spec["high"]), 2**62))
    if spec["type"] is float:
        return st.floats(spec["low"], spec["high"])
    return st.text(st.characters(codec="utf-8"))


settings = st.fixed_dictionaries(
    {}, optional={k: _values(s) for k, s in config.describe().items() if "overlap" not in k and "chunk" not in k}
)


@given(settings)
def test_the_flat_form_round_trips(values: dict[str, Any]) -> None:
    built = config.merge(values)
    assert config.merge(config.to_flat(built)) == built
    assert {key: config.to_flat(built)[key] for key in values} == values


@given(settings, settings)
def test_later_layers_win(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert config.merge(first, second) == config.merge({**first, **second})


def test_every_option_explains_itself() -> None:
    assert all(len(spec["help"]) > 5 for spec in config.describe().values())


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("stream.etta", "1", "did you mean 'stream.eta'"),
        ("stream.eta", "two", "must be of type float"),
        ("stream.eta", "1.5", "must lie in 0..1"),
        ("stream.eta", "nan", "finite"),
        ("refine.blending", "sometimes", "must be one of randomized"),
        ("stream.cam", "maybe", "true or false"),
        ("num_frames", "0", "must lie in 1"),
        ("stream.overlap", "16", "overlap is 16"),
    ],
)
def test_bad_values_name_the_key(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.merge({key: config.parse_value(key, text)})
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert key.split(".")[-1][:3] in caught.value.message


def test_presets_load_with_every_quality() -> None:
    for path in (Path(config.__file__).parent / "presets").glob("*.toml"):
        config.merge(config.preset(path.stem))
        for quality in ("reference", "balanced", "fast"):
            config.merge(config.preset(path.stem, quality))


def test_unknown_preset_quality_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preset"):
        config.preset("dmeo")
    with pytest.raises(ConfigError, match="unknown quality"):
        config.preset("demo", "superb")
    with pytest.raises(ConfigError, match="cannot read"):
        config.read_toml(tmp_path / "none.toml")
    for text in ("a = = 1", f"a = {'9' * 5000}", "a = " + "[" * 5000):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match="not valid TOML"):
            config.read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="must be of type float"):
        config.merge({"stream.guidance_scale": 10**400})
