"""The words of the command line: lengths as times, aliases, variations, plans, and what is meant by other words."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v import files
from streamt2v.cli import options
from streamt2v.cli.app import app
from streamt2v.jobs import forecast
from streamt2v.timeline import parse_time
from tests.cli.helpers import SCHEMA, call, made, result

pytestmark = pytest.mark.usefixtures("toy_family")
TOY = ("--model", "toy", "--device", "cpu", "--threads", "1")


def planned(capsys: pytest.CaptureFixture[str], *given: object) -> dict[str, object]:
    assert call("plan", "abc", "--json", "--device", "cpu", *given) == 0
    return result(capsys)


@pytest.mark.parametrize(
    ("given", "frames"),
    [
        (["--frames", "240"], 240), (["-n", "10s"], 80), (["--frames", "1:20"], 640), (["--duration", "2m"], 960),
        (["--duration", "1m30s"], 720), (["--duration", "1h"], 28800), (["--duration", "0.01s"], 1),
        (["--frames", "2.5s", "--fps", "30000/1001"], 75),
    ],
)  # fmt: skip
def test_a_length_is_frames_or_a_time(given: list[str], frames: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert planned(capsys, *given)["num_frames"] == frames


@given(st.integers(0, 99), st.integers(0, 59), st.integers(0, 59), st.sampled_from([1.0, 8.0, 24.0]))
def test_all_ways_to_write_a_time_agree(hours: int, minutes: int, seconds: int, fps: float) -> None:
    frames = round((3600 * hours + 60 * minutes + seconds) * fps)
    assert parse_time(f"{hours}h{minutes}m{seconds}s", fps) == frames
    assert parse_time(f"{hours}:{minutes:02}:{seconds:02}", fps) == frames
    assert parse_time(f"{60 * hours + minutes}:{seconds}", fps) == frames
    assert parse_time(f"{3600 * hours + 60 * minutes + seconds}s", fps) == frames


def test_a_batch_has_lengths_as_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "frames": "2s"}\n{"prompt": "b"}\n{"prompt": "c", "duration": "1s"}\n')
    out = tmp_path / "videos"
    assert call("batch", rows, "--out-dir", out, *TOY, "--frames", "3s", "--no-refine", "--json") == 2
    assert "--duration both" in capsys.readouterr().out
    rows.write_text('{"prompt": "a", "frames": "2s"}\n{"prompt": "b"}\n{"prompt": "c", "frames": 9}\n')
    assert call("batch", rows, "--out-dir", out, *TOY, "--frames", "3s", "--no-refine", "--json") == 0
    events = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [event["frames"] for event in events if event["type"] == "start"] == [16, 24, 9]


@pytest.mark.parametrize(
    ("aliases", "plain"),
    [
        (["-s", "7", "--width", "64"], ["--seed", "7", "--size", "64x32"]),
        (["--height", "48"], ["--size", "96x48"]),
        (["--width", "64", "--height", "48"], ["--size", "64x48"]),
        (["--cfg", "3"], ["--guidance", "3"]),
        (["--negative-prompt", "fog"], ["--negative", "fog"]),
    ],
)
def test_aliases_mean_the_same(
    aliases: list[str], plain: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = []
    for number, more in enumerate((aliases, plain)):
        path = tmp_path / f"{number}.mp4"
        assert call("generate", "abc", "--seed", "7", "--frames", "4", "-o", path, *TOY, *more) == 0
        capsys.readouterr()
        assert call("info", path, "--json") == 0
        recipes.append(result(capsys)["recipe"]["config"])
    assert recipes[0] == recipes[1]


def test_variations_have_seeds_that_follow_and_numbered_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.mp4"
    assert call("generate", "abc", "--frames", 8, "--seed", 5, "--count", 3, "-o", path, *TOY, "--json") == 0
    events = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert [event["seed"] for event in events if event["type"] == "start"] == [5, 6, 7]
    assert sorted(file.name for file in tmp_path.glob("*.mp4")) == ["out-1.mp4", "out-2.mp4", "out-3.mp4"]
    assert call("generate", "abc", "--frames", 8, "--seed", 5, "--count", 3, "-o", path, *TOY) == 5


def test_a_dry_run_is_the_plan_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    wanted = planned(capsys, "--model", "toy", "--frames", "10s", "--threads", 1)
    before = set(tmp_path.iterdir())
    assert call("generate", "abc", "--frames", "10s", "-o", path, *TOY, "--dry-run", "--json") == 0
    found = result(capsys)
    assert (found["num_frames"], found["stream_chunks"]) == (80, wanted["stream_chunks"])
    assert set(tmp_path.iterdir()) == before
    source = made(tmp_path / "in.mp4", 20)
    assert call("extend", source, "--prompt", "abc", "--duration", "5s", *TOY, "--dry-run") == 0
    assert "40 frames" in capsys.readouterr().out
    assert call("extend", source, "--prompt", "abc", "--frames", 40, *TOY, "--dry-run", "--json") == 0
    found = result(capsys)  # of the 20 frames, the last 16 are the first chunk
    assert (found["stream_chunks"][0]["start"], found["stream_chunks"][-1]["stop"]) == (4, 40)
    assert (found["refine_chunks"][0]["start"], found["refine_chunks"][-1]["stop"]) == (4, 40)
    assert call("extend", source, *TOY) == 2
    assert "--duration" in capsys.readouterr().err


def test_a_dry_run_of_refine_plans_the_refiner_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "in.mp4"
    assert call("generate", "abc", "--frames", 20, "--no-refine", "-o", source, *TOY, "-q") == 0
    refining, before = ("refine", source, *TOY, "--dry-run"), set(tmp_path.iterdir())
    capsys.readouterr()
    assert call(*refining, "--json") == 0
    found = result(capsys)
    assert (found["num_frames"], found["stream_chunks"], found["width"]) == (20, [], 64)
    assert found["refine_chunks"][-1]["stop"] == 20
    measured = dict.fromkeys(forecast.MEASURED, 1.0) | {"fixed_seconds": 1000.0, "stream_seconds_per_chunk": 1000.0}
    monkeypatch.setattr(forecast, "expected", lambda *_: measured)
    assert call(*refining) == 0
    said = capsys.readouterr().out
    assert "source   32x16" in said and "stream" not in said
    assert f"time     about {20 + len(found['refine_chunks'])} s," in said
    assert set(tmp_path.iterdir()) == before
    assert call("refine", source, "-o", source, *TOY, "--dry-run") == 5


def test_a_dry_run_of_a_batch_plans_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "new" / "videos"
    rows.write_text('{"prompt": "a", "frames": 9}\n{"prompt": "b", "frames": "2s", "output": "sub/b.mp4"}\n')
    batch, before = ("batch", rows, "--out-dir", out, *TOY), set(tmp_path.iterdir())
    assert call(*batch, "--dry-run") == 0
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("0 made, 0 already there, 0 failed, 2 left")
    assert [row.partition(": ")[0] for row in said.out.splitlines()] == [str(out / "a.mp4"), str(out / "sub" / "b.mp4")]
    assert "16 frames at 8 fps, refined to 64x32; " in said.out
    assert set(tmp_path.iterdir()) == before
    assert call(*batch, "--shard", "1/2", "--keep-run") == 0
    monkeypatch.setattr(forecast, "expected", lambda *_: dict.fromkeys(forecast.MEASURED, 1.0))
    capsys.readouterr()
    assert call(*batch, "--dry-run", "--json") == 0
    events = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    for event in events:
        SCHEMA.validate(event)
    assert [(event["type"], event.get("job"), event.get("status")) for event in events] == [
        ("plan", "sub/b", None), ("result", "a", "there"), ("result", None, None),
    ]  # fmt: skip
    assert events[0]["num_frames"] == 16
    assert events[-1]["seconds_left"] == events[0]["seconds"] > 16
    assert sorted(file.name for file in out.iterdir()) == ["a.mp4", "a.mp4.streamt2v"]
    rows.write_text('{"prompt": "a", "frames": 0}\n')
    assert call(*batch, "--dry-run") == 2


def test_a_dry_run_of_variations_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = tmp_path / "out.mp4", set(tmp_path.iterdir())
    assert call("generate", "abc", "--seed", 5, "--count", 2, "-o", path, *TOY, "--dry-run", "--json") == 0
    events = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    named = [("out-1.mp4", 5), ("out-2.mp4", 6)]
    assert [(Path(event["output"]).name, event["seed"]) for event in events[:-1]] == named
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("generate a red ball", 'quote the prompt: streamt2v generate "a red ball"'),
        ("plan red ball --frames 24", 'quote the prompt: streamt2v plan "red ball"\n'),
        ("plan --frames 24 a red ball", 'quote the prompt: streamt2v plan "a red ball"\n'),
        ("refine a.mp4 b.mp4", "what is written is named with -o"),
        ("generate x --lenght 10s", "here that is --duration"),
        ("generate x --length 10s", "here that is --duration"),
        ("generate x --cfg-scale 3", "here that is --guidance"),
        ("upscale x.mp4", "here that is refine"),
        ("plan x --frames many", "--frames is 'many', it must be a number of frames or a time"),
        ("plan x --duration soon", "--duration is 'soon'"),
        ("plan x --frames 0", "--frames is 0"),
        ("plan x --steps 0", "--steps is 0"),
        ("plan x --seed -1", "--seed is -1"),
        ("plan x --guidance 1000", "--guidance is 1000.0"),
        ("plan x --size 99999x8", "--size is 99999"),
        ("plan x --set num_frames=0", "num_frames is 0"),
        ("plan x --size 8x8 --width 8", "leave one of them out"),
        ("generate x --count 0", "'0' is no whole number from 1 to 10000"),
        ("generate x --width 1.5", "'1.5' is no whole number from 2 to 16384"),
        ("plan x --memory nan", "'nan' is no number from 0.1 to"),
        ("plan x --threads 0", "'0' is no whole number from 1"),
    ],
)
def test_errors_speak_of_what_was_typed(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*typed.split()) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert len(shown.splitlines()) <= 6


def test_what_is_meant_exists() -> None:
    """Every word that is suggested for another is a command or an option of one."""
    import typer

    group = typer.main.get_command(app)
    commands = {**group.commands, **group.commands["weights"].commands}  # type: ignore[attr-defined]
    names = {name for command in commands.values() for part in command.params for name in part.opts} | set(commands)
    for meant in options._MEANT.values():
        words = [word for word in re.split(r"[ ,()]+", meant) if word not in ("a", "or", "run", "video", "streamt2v")]
        assert set(filter(None, words)) <= names, meant


def test_plan_warns_of_unknown_words_and_speaks_in_minutes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = dict.fromkeys(forecast.MEASURED, 1.0) | {"peak_memory_bytes": 5e8}
    monkeypatch.setattr(forecast, "expected", lambda *_: measured)
    assert call("plan", "a red zebra", "--model", "demo", "--frames", 600, "--device", "cpu") == 0
    said = capsys.readouterr()
    assert "does not know the word zebra" in said.err
    assert re.search(r"time +about 12 min:", said.out)
    assert re.findall(r"(\d[\d.]*) measured of [\d.]+ GB|(\d+) MB when", said.out) == [("0.5", "")]


def test_a_plan_needs_no_prompt_and_says_the_size_of_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("plan", *TOY, "--frames", 600, "--size", "100x32") == 0
    assert "frames, into 64x32\n" in capsys.readouterr().out
    assert call("refine", made(tmp_path / "in.mp4", 16), "--size", "90x90", "--dry-run") == 0
    assert "into 90x46" in capsys.readouterr().out  # 2:1, even
    assert call("refine", tmp_path / "in.mp4", "--size", "90x90", "--fit", "pad", "--dry-run") == 0
    assert "into 90x90" in capsys.readouterr().out


def test_info_is_ten_lines_and_all_is_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out.mp4"
    assert call("generate", "abc", "--frames", 20, "--seed", 7, "-o", path, *TOY, "-q") == 0
    capsys.readouterr()
    assert call("info", path) == 0
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) <= 10
    for said in ("64x32, 20 frames at 8 fps, 2.5 s", "abc", "model toy", "seed      7", "cpu, 1 thread\n"):
        assert said in shown
    assert call("info", path, "--all") == 0
    assert "recipe.config.stream.overlap = 8" in capsys.readouterr().out


def test_help_has_two_levels(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("generate", "--help") == 0
    short = capsys.readouterr().out
    assert call("generate", "--help-all") == 0
    whole = capsys.readouterr().out
    assert "--overlap" not in short and "--overwrite" not in short
    assert "streamt2v generate --help-all" in short
    assert all(name in whole for name in ("--overlap", "--overwrite", "--frames"))
    assert "--help-all" not in whole.splitlines()[-1]
    for command in ("generate", "refine", "extend", "batch", "plan", "interpolate"):
        assert call(command, "--help-all") == 0
        shown = capsys.readouterr().out
        assert "<=" not in shown  # a range as typer shows it leaves no room for the words
        panels = re.findall(r"╭─ ([A-Z][^─]*?) ─", shown)
        order = ["Arguments", "Options", options.STEERING, options.ADVANCED, options.RUNNING]
        assert panels == [name for name in order if name in panels]


@given(st.text(st.sampled_from("abc xyz é木-"), max_size=120))
def test_names_are_cut_at_words(text: str) -> None:
    name = files.slug(text)
    words = files.slug(text.replace("-", " ")).split("-")
    assert 0 < len(name.encode()) <= 48
    whole = "".join(letter if letter.isalnum() else " " for letter in text.lower()).split()
    assert name == "video" or len(words) == 1 or set(words) <= set(whole)


def test_weights_list_says_origins_and_takes_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("weights", "list", "--json") == 0
    for row in result(capsys):
        assert row["origin"]  # type: ignore[index]
        if row["name"] == "toy":  # type: ignore[index]
            continue  # which has no files
        assert call("weights", "list", row["name"]) == 0  # type: ignore[index]
        assert capsys.readouterr().out
