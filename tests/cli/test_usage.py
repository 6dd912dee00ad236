"""The command line before any model loads: help, errors, exit codes, clean streams."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamt2v import devices, memory, weights
from streamt2v.cli import look
from streamt2v.cli.app import main
from streamt2v.config import RunConfig, merge, preset, to_flat
from streamt2v.errors import ConfigError, OutputError
from streamt2v.jobs import again, forecast, prepare
from streamt2v.jobs.job import Job
from streamt2v.jobs.prepared import Prepared
from streamt2v.jobs.run_directory import RunDirectory, directory_for
from streamt2v.weights import inventory
from tests.cli.helpers import PROMPT, call, made

MISTAKES = [
    (["generate", ""], 2, "the prompt is empty"),
    (["generate"], 2, "the prompt is empty"),
    (["generate", "a red ball", "--frames", "0"], 2, "--frames is 0"),
    (["generate", "a red ball", "--frames", "many"], 2, "--frames"),
    (["generate", "a red ball", "--seed", "-1"], 2, "seed is -1"),
    (["generate", "a red ball", "--model", "dmeo"], 2, "did you mean 'demo'"),
    (["generate", "a red ball", "--set", "stream.etta=1"], 2, "did you mean 'stream.eta'"),
    (["generate", "a red ball", "--set", "nonsense"], 2, "must look like"),
    (["generate", "a red ball", "--size", "big"], 2, "1280x720"),
    (["plan", "a red ball", "--size", "9" * 5000 + "x3"], 2, "1280x720"),
    (["plan", "a red ball", "--memory", "inf"], 2, "--memory"),
    (["plan", "a red ball", "--image", "none.png"], 3, "none.png"),
    (["plan", ""], 2, "the prompt is empty"),
    (["generate", "a red ball", "--fps", "0"], 2, "--fps is 0"),
    (["generate", "a red ball", "-o", "out.avi"], 2, "must end in .mp4"),
    (["generate", "a red ball", "--image", "none.png", "-o", "x.mp4"], 3, "none.png"),
    (["generate", "a red ball", "--preset", "dmeo"], 2, "unknown preset"),
    (["generate", "a red ball", "--config", "none.toml"], 2, "cannot read"),
    (["generate", "a red ball", "-o", "/proc/nowhere/x.mp4"], 5, "/proc"),
    (["generate", "a red ball", "-o", "x.mp4", "--preview", "x.gif"], 2, "must end in .png"),
    (["generate", "a red ball", "--quality", "superb"], 2, "superb"),
    (["generate", "a red ball", "--fit", "stretch"], 2, "contain, cover, pad"),
    (["generate", "a red ball", "--init", "nobody"], 2, "no model and no folder"),
    (["generate", "a red ball", "--resume"], 2, "name it with -o"),
    (["generate", "a red ball", "b.mp4"], 2, "b.mp4"),
    (["refine", "none.mp4"], 3, "none.mp4"),
    (["info", "none.mp4"], 3, "none.mp4"),
    (["info", "x" * 5000], 2, "too long"),
    (["generate", "a red ball", "--resume", "-o", "."], 3, "not a file"),
    (["refine", ""], 3, "not a file"),
    (["extend", "/", "--frames", "30"], 3, "not a file"),
    (["plan", "a red ball", "--device", "banana"], 2, "'banana' is not a device"),
    (["plan", "a red ball", "--device", "cuda:x"], 2, "'cuda:x' is not a device"),
    (["generate", "\u044f" * 9000, "-o", "x.mp4"], 2, "too long"),
    (["train", "base"], 2, "needs a limit"),
    (["evaluate"], 2, "Missing argument"),
    (["nonsense"], 2, "nonsense"),
    (["weights", "pull", "streamingt2"], 2, "did you mean 'streamingt2v'"),
    (["weights", "pull", "demo"], 2, "nothing to pull"),
    (["weights", "pull", "streamingt2v", "--source", "copy"], 2, "known: vidxtend, original"),
    (["weights", "pull", "streamingt2v", "--from", "nowhere"], 3, "nowhere is not a folder"),
    (["weights", "pull", "svd", "--from", "."], 2, "leave --source, --from, --no-refine and --refiner out"),
    (["weights", "pull", "streamingt2v", "--offline"], 4, "no connection is made when offline"),
    (["weights", "verify", "svd"], 4, "streamt2v weights pull svd"),
    (["weights", "convert", "none.ckpt", "out"], 3, "none.ckpt"),
    (["generate", "a cat", "--model", "streamingt2v", "-o", "x.mp4"], 4, "streamt2v weights pull streamingt2v"),
]


@pytest.mark.parametrize(("arguments", "code", "said"), MISTAKES)
def test_mistakes_are_a_few_clear_lines(
    arguments: list[str],
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert len(captured.err.splitlines()) <= 6
    assert "Traceback" not in captured.err
    assert list(tmp_path.iterdir()) == []


TYPOS = {
    "genrate": "generate", "generat": "generate", "refin": "refine", "refinee": "refine", "extnd": "extend",
    "plna": "plan", "inof": "info", "evalute": "evaluate", "docter": "doctor", "weigths": "weights", "tran": "train",
    "prevew": "preview", "reprot": "report",
    "weights lst": "list", "weights pul": "pull", "weights verfy": "verify", "weights convrt": "convert",
    "plan x --frmaes 9": "--frames", "plan x --modle demo": "--model", "plan x --sed 3": "--seed",
    "plan x --fsp 3": "--fps", "plan x --sise 8x8": "--size", "plan x --imge a": "--image",
    "plan x --inti own": "--init",
    "plan x --step 3": "--steps", "plan x --qualty fast": "--quality", "plan x --chnk 3": "--chunk",
    "plan x --overlp 3": "--overlap", "plan x --timelin a": "--timeline", "generate x --overwite": "--overwrite",
    "generate x --resum": "--resume", "generate x --prevew a.png": "--preview",
    "plan x --model dem": "demo", "plan x --model streamingtv": "streamingt2v", "plan x --preset demmo": "demo",
    "plan x --quality fsat": "fast", "plan x --quality balancd": "balanced", "plan x --fit padd": "pad",
    "weights pull svdd": "svd", "weights path modelscpe": "modelscope", "plan x --set strem.eta=1": "stream.eta",
}  # fmt: skip


def test_typos_are_answered_by_what_was_meant(capsys: pytest.CaptureFixture[str]) -> None:
    """Of one-edit typos of commands, options and names, 95 % get the right word among at most three."""
    missed = []
    for typed, meant in TYPOS.items():
        assert call(*typed.split()) == 2
        said = " ".join(capsys.readouterr().err.replace("│", " ").split())
        found = re.search(r"(?:[Dd]id you mean|Possible options:) (.*)", said)
        if found is None or meant not in re.split(r"[ ',?)]+", found[1].partition("known")[0]):
            missed.append(typed)
    assert len(TYPOS) >= 40
    assert len(missed) <= len(TYPOS) // 20, missed


@pytest.mark.parametrize("content", [b"", b"just text\n" * 50, bytes(range(256)) * 40])
def test_files_that_are_no_video(content: bytes, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "odd.mp4"
    path.write_bytes(content)
    assert call("refine", str(path)) == 3
    assert "odd.mp4" in capsys.readouterr().err


def test_more_frames_than_a_video_has_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = made(tmp_path / "in.mp4", 3)
    assert call("refine", str(path), "--set", "num_frames=4") == 2
    assert "num_frames is 4" in capsys.readouterr().err
    assert not (tmp_path / "in_refined.mp4").exists()


def test_a_recipe_with_half_a_character_is_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Anybody may have written the tag of a video."""
    path = made(tmp_path / "in.mp4", 3, r'{"streamt2v": "1", "config": {"prompt": "\ud800"}}')
    assert call("info", str(path), "--json") == 0
    assert json.loads(capsys.readouterr().out)["recipe"]["config"]["prompt"] == "\ud800"
    assert call("info", str(path)) == 0
    assert "prompt" in capsys.readouterr().out


def test_a_preview_that_is_a_folder_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "sheet.png").mkdir()
    output = str(tmp_path / "x.mp4")
    assert call("generate", "a red ball", "-o", output, "--preview", str(tmp_path / "sheet.png")) == 5
    assert "is a folder" in capsys.readouterr().err


def test_what_weights_do_not_say_is_their_networks_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "read_header", lambda path: ("any", {}, None))
    wish = merge(preset("demo"), {"prompt": "a red ball", "num_frames": 40, "stream.overlap": 4})
    with pytest.raises(ConfigError, match="looks at 8 frames"):
        prepare.prepare(Job("generate", wish, tmp_path / "out.mp4"))


def test_a_run_of_another_version_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    recipe = {"command": "generate", "version": "0.0.1", "memory": {"old": 1}, "config": {"seed": 7}}
    RunDirectory.open(directory_for(path), recipe, resume=False).close()
    assert call("generate", "a red ball", "--resume", "-o", str(path)) == 5
    assert '"0.0.1", now it is' in capsys.readouterr().err


def test_a_video_of_another_version_is_finished_where_the_settings_are_the_same(tmp_path: Path) -> None:
    wish = merge(preset("demo"), {"prompt": "a red ball", "num_frames": 4})
    job = Job("generate", wish, tmp_path / "out.mp4")
    made(job.output, 4, json.dumps({"streamt2v": "0.0.1", "version": "0.0.1", **Prepared(job).recipe()}))
    assert again.finished(Prepared(job)).frames == 4
    with pytest.raises(OutputError, match=r"config\.seed"):
        again.finished(Prepared(dataclasses.replace(job, config=dataclasses.replace(wish, seed=9))))


def test_what_a_video_was_made_from_is_known_by_its_bytes(tmp_path: Path) -> None:
    source = made(tmp_path / "in.mp4", 4)
    job = Job("refine", merge(preset("demo"), {"num_frames": 4}), tmp_path / "out.mp4", source)
    made(job.output, 4, json.dumps({"streamt2v": "0.0.1", **Prepared(job).recipe()}))
    os.utime(source, (1, 1))  # as a copy or a checkout does
    assert again.finished(Prepared(job)).frames == 4
    data = bytearray(source.read_bytes())
    data[-1] ^= 1
    source.write_bytes(data)
    with pytest.raises(OutputError, match=r"source\.sha256"):
        again.finished(Prepared(job))


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"fixed_seconds": 1}}', '{"a": null}'])
def test_damaged_timings_are_forgotten(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path))
    (tmp_path / "timings.json").write_text(text)
    wish = merge(preset("demo"), {"prompt": "a red ball"})

    def plan(run: RunConfig, device: str = "cpu", **more: Any) -> forecast.Plan:
        return forecast.plan(Prepared(Job("generate", run, tmp_path / "out.mp4", device=device, **more)))

    assert plan(wish).seconds is None
    found = plan(wish, threads=1)
    seen, measured = devices.Glance("cpu", found.free_bytes), dict.fromkeys(forecast.MEASURED, 2.0)
    forecast.remember(wish, seen, 1, found.policy, measured)
    assert plan(wish, threads=1).seconds == 2.0 + (1 + 1 + 24) * 2.0
    assert plan(merge(to_flat(wish), {"initialize.num_inference_steps": 3}), threads=1).seconds is None
    assert plan(wish, threads=3).seconds is None
    assert plan(wish, "mps", memory=16, threads=1).seconds is None


def test_of_two_stages_at_once_the_longer_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path))
    asked = {"refine.num_inference_steps": 3, "refine.overlap": 8, "refine.shift_back": True}
    wish = merge(preset("demo"), {"prompt": "a red ball", "num_frames": 240, **asked})

    def plan(threads: int, gigabytes: float | None = None) -> forecast.Plan:
        job = Job("generate", wish, tmp_path / "out.mp4", device="cpu", threads=threads, memory=gigabytes)
        return forecast.plan(Prepared(job))

    found, alone = plan(2), plan(1)
    stream, refine = len(found.stream_chunks), len(found.refine_chunks)
    assert (found.together, alone.together, plan(2, 0.1).together) == (True, False, False)
    assert found.needed_bytes > alone.needed_bytes
    assert "32 bit, all stages at once, guidance in one batch" in found.as_text()
    for streaming, refining, frame in [(3.0, 1.0, 0.01), (1.0, 3.0, 0.01), (1.0, 1.0, 1.0)]:
        measured = dict(zip(forecast.MEASURED, [5.0, streaming, refining, frame, 1e9], strict=True))
        for plans, together in ((found, True), (alone, False)):
            seen = devices.Glance("cpu", plans.free_bytes)
            forecast.remember(wish, seen, 1, plans.policy, measured, together)
        first, second = (stream - 1) * streaming, refine * refining + 240 * frame
        assert plan(1).seconds == pytest.approx(5 + first + second)
        # The last two and three chunks of the refiner lack one, two and three of three steps: two chunks.
        assert plan(2).seconds == pytest.approx(5 + max(first + second * 2 / refine, second))


@settings(deadline=None)
@given(threads=st.integers(1, 64), recorded=st.none() | st.integers(1, 64), cores=st.integers(1, 64))
def test_no_run_computes_with_more_threads_than_it_may(threads: int, recorded: int | None, cores: int) -> None:
    """Nor splits its sums otherwise than it began."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", str(cores))
        for asked in (None, threads):
            for more in ({}, {"refine.enabled": False}, {"compile": True}, {"loop": "stream"}):
                wish = merge(preset("demo"), {"prompt": "a red ball"}, more)
                known = Prepared(Job("generate", wish, Path("out.mp4"), threads=asked))
                own, allowed = known.threads("cpu", recorded), asked or cores
                policy = memory.ladder("cpu")[0]
                together = known.side_by_side("cpu", policy, 10**10, own)
                if asked is None and recorded is not None:
                    assert own == recorded
                else:
                    assert own == (allowed if more else max(1, allowed // 2))
                assert together == (not more and 2 * own <= allowed)
                assert not known.side_by_side("cpu", memory.ladder("cpu")[1], 10**10, own)
                assert not known.side_by_side("cpu", policy, 10**8, own)
                assert not known.side_by_side("cuda", policy, 10**11, own)
                assert known.threads("cuda") == allowed


def test_existing_output_is_kept(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    path.write_text("precious")
    assert call("generate", "a red ball", "-o", str(path)) == 5
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_text() == "precious"


def test_unknown_words_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.mp4"
    wish = merge(preset("demo"), {"prompt": "a red zebra over the sea"})
    notices = prepare.prepare(Job("generate", wish, path, overwrite=True)).notices
    assert "zebra" in notices[0]
    assert "red" not in notices[0]
    assert "red" in notices[1]


def test_an_artist_that_is_not_asked_is_named(tmp_path: Path) -> None:
    wish = merge(preset("demo"), {"prompt": "a red ball", "initialize.text_to_image": "sdxl"})
    assert "sdxl is not used" in prepare.prepare(Job("generate", wish, tmp_path / "out.mp4")).notices[0]


def test_plan_is_json_and_counts(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", "a red ball", "--frames", "1200", "--json") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_frames"] == 1200
    assert len(plan["stream_chunks"]) == 149
    assert plan["refine_chunks"][-1]["stop"] == 1200
    assert call("plan", "a red ball", "--frames", "1200") == 0
    assert "149 chunks" in capsys.readouterr().out


def test_what_stands_behind_two_dashes_is_no_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name in ("--no-color", "--debug", "--json"):
        assert call("info", "--", name) == 3
        said = capsys.readouterr()
        assert f"{name} does not exist" in said.err
        assert said.out == ""
    assert "NO_COLOR" not in os.environ


def test_every_command_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "refine", "resume", "verify", "rerun", "plan", "evaluate", "info", "doctor", "train"):
        assert call(command, "--help") == 0
        assert f"streamt2v {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--device", "nonsense"], 2, "nonsense"),
        (["--device", "cuda:77"], 2, "cuda:77"),
        (["--set", "stream.height=73"], 2, "multiples of 8"),
        (["--set", "stream.overlap=4", "--frames", "40"], 2, "looks at 8 frames"),
        (["--set", "refine.noise_level=1000"], 2, "noise"),
        (["--threads", "0"], 2, "--threads"),
        (["--resume", "--set", "output.crf=99"], 2, "output.crf"),
        (["--negative", "\udcff"], 2, "UTF-8"),
    ],
)
def test_a_refused_run_leaves_nothing_behind(
    options: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "out.mp4"
    assert call("generate", "a red ball", "-o", str(path), *options) == code
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_config_file_with_a_wrong_type_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("model = 3")
    assert call("generate", "a red ball", "--config", str(file)) == 2
    assert "'3'" in capsys.readouterr().err


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "streamt2v", "generate", b"a red ball \xff", "-o", str(tmp_path / "x.mp4")],
        capture_output=True,
    )
    assert done.returncode == 2
    assert b"UTF-8" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("command", "code", "printed"),
    [
        ("generate --json --fraems 9 a", 2, '"message": "No such option: --fraems'),
        ("info none.mp4 --json 2>&-", 3, '"none.mp4 does not exist"'),
        ("info none.mp4 --json 2>/dev/full", 3, '"none.mp4 does not exist"'),
        ("generate - --json <&-", 2, '"the prompt is empty"'),
        ("batch - --out-dir nowhere --json <&- 2>&-", 2, '"standard input holds no jobs"'),
        ("weights list >/dev/full", 5, ""),
        ("weights list >&-", 0, ""),
    ],
)
def test_whatever_the_shell_connects(command: str, code: int, printed: str, tmp_path: Path) -> None:
    line = f"{sys.executable} -m streamt2v {command}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (code, False)
    assert printed in done.stdout
    assert not printed or json.loads(done.stdout)["error"]["exit_code"] == code
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_an_event_too(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(look, "describe_video", lambda path: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info", "x.mp4", "--json"])
    assert json.loads(capsys.readouterr().out)["error"]["code"] == "unexpected"


def test_a_closed_pipe_is_quiet() -> None:
    command = f"{sys.executable} -m streamt2v weights list | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode in (0, 141)  # 0 where the pipe took everything before it was closed
    assert done.stderr == ""


@pytest.mark.parametrize(("device", "model"), [("cpu", "demo"), ("cuda", "streamingt2v")])
def test_the_default_model_fits_the_device(
    device: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All weights are here; a GPU that is not here can be planned for."""
    monkeypatch.setattr(inventory, "missing", lambda family, *_: [])
    assert call("plan", PROMPT, "--device", device, "--memory", 40, "--json") == 0
    assert json.loads(capsys.readouterr().out)["model"] == model
