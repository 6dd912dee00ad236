"""Config: flat and back, precedence, and errors that name the key."""

import contextlib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v import config
from streamt2v.errors import ConfigError
from streamt2v.timeline import prompt_at, turns


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


LINKED = ("chunk", "overlap", "anchor")  # each is bounded by another
settings = st.fixed_dictionaries(
    {}, optional={k: _values(s) for k, s in config.describe().items() if not any(name in k for name in LINKED)}
)


@given(settings)
def test_the_flat_form_round_trips(values: dict[str, Any]) -> None:
    built = config.merge(values)
    assert config.merge(config.to_flat(built)) == built
    assert {key: config.to_flat(built)[key] for key in values} == values


@given(settings, settings)
def test_later_layers_win(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert config.merge(first, second) == config.merge({**first, **second})


@given(settings, st.dictionaries(st.integers(1, 10**6), st.text(st.characters(codec="utf-8"))))
def test_prompts_over_time_are_settings_too(values: dict[str, Any], prompts: dict[int, str]) -> None:
    flat = {**values, **{f"prompts.{frame}": text for frame, text in prompts.items()}, "num_frames": 10**6 + 1}
    built = config.merge(flat)
    assert built.prompts == prompts
    assert list(built.prompts) == sorted(prompts)
    assert config.merge(config.to_flat(built)) == built


@given(st.integers(1, 80), st.integers(0, 40), st.sets(st.integers(1, 79)), st.sampled_from(["generate", "extend"]))
def test_a_timeline_turns_where_chunks_begin(frames: int, kept: int, asked: set[int], command: str) -> None:
    """Every change is on a frame that a streaming chunk begins with, or inside what is kept; and there it is valid."""
    kept = kept if command == "extend" else 0
    texts = {f"prompts.{frame}": str(frame) for frame in asked}
    with contextlib.suppress(ConfigError):
        timeline = turns(config.merge(texts, {"prompt": "0", "num_frames": frames}), command, kept)
        assert [prompt.text for prompt in timeline] == [str(frame) for frame in (0, *sorted(asked))]
        begin = max(0, kept - 16)
        for prompt in timeline[1:]:
            assert prompt.frame < kept or (prompt.frame - begin) % 8 == 0
            assert 0 <= prompt.frame - prompt.asked < 16
            assert prompt_at(timeline, prompt.frame) == prompt.text
            assert prompt_at(timeline, prompt.frame - 1) != prompt.text


def test_every_option_explains_itself() -> None:
    assert all(len(spec["help"]) > 5 for spec in config.describe().values())


@pytest.mark.parametrize(
    ("key", "text", "message"),
    [
        ("stream.etta", "1", "did you mean 'stream.eta'"),
        ("stream.eta", "two", "must be of type float"),
        ("stream.eta", "1.5", "must lie in 0..1"),
        ("stream.eta", "nan", "finite"),
        ("refine.posterior", "sometimes", "must be one of published"),
        ("stream.cam", "maybe", "true or false"),
        ("num_frames", "0", "must lie in 1"),
        ("stream.overlap", "16", "overlap is 16"),
        ("prompts.24", "late", "ends with frame 23"),
        ("prompts.0", "now", "unknown setting"),
        ("prompts.024", "late", "unknown setting"),
    ],
)
def test_bad_values_name_the_key(key: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.merge({key: config.parse_value(key, text)})
    assert message in f"{caught.value.message} {caught.value.hint}"
    assert key.split(".")[-1][:3] in caught.value.message


def test_presets_load_with_every_quality_and_strength() -> None:
    for path in (Path(config.__file__).parent / "presets").glob("*.toml"):
        config.merge(config.preset(path.stem))
        for quality in get_args(config.Quality):
            config.merge(config.preset(path.stem, quality))
        levels = [
            config.merge(config.preset(path.stem, strength=strength)).refine.noise_level
            for strength in get_args(config.Strength)
        ]
        assert levels == sorted(set(levels))


def test_unknown_preset_quality_and_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown preset"):
        config.preset("dmeo")
    with pytest.raises(ConfigError, match="unknown quality"):
        config.preset("demo", "superb")
    with pytest.raises(ConfigError, match="unknown strength"):
        config.preset("demo", strength="superb")
    with pytest.raises(ConfigError, match="cannot read"):
        config.read_toml(tmp_path / "none.toml")
    for text in ("a = = 1", f"a = {'9' * 5000}", "a = " + "[" * 5000):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ConfigError, match="not valid TOML"):
            config.read_toml(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match="must be of type float"):
        config.merge({"stream.guidance_scale": 10**400})


def test_a_recipe_of_before_a_setting_means_its_default() -> None:
    """So a run begun before can be continued; what is no recipe of a run stays as it is."""
    now = config.to_flat(config.merge(config.preset("restore"), {"refine.shift_back": True}))
    before = {key: value for key, value in now.items() if key != "refine.shift_back"}
    assert config.up_to_date({"config": before, "seed": 1}) == {"config": now, "seed": 1}
    assert config.up_to_date({"config": {"a": 1}}) == {"config": {"a": 1}}
    assert config.up_to_date({"config": None}) == {"config": None}
