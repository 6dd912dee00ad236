"""`streamt2v batch`: rows become videos, each once, whatever happens between; on Ray the same ones."""

import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer

from streamt2v import config, devices, errors, weights
from streamt2v.batch import here, on_ray, rows, run, tasks
from streamt2v.cli import app
from streamt2v.jobs import asked, prepared, run_directory
from streamt2v.jobs.job import Job, Result
from streamt2v.jobs.prepared import Prepared
from streamt2v.runs import pipeline
from tests.cli.helpers import PROMPT, TINY, call, digest, made, start

needs_ray = pytest.mark.skipif(not find_spec("ray"), reason="the extra ray is not installed")
SCHEMA = json.loads((resources.files("streamt2v") / "event.schema.json").read_text())
SUBJECTS = ("ball", "star", "lantern", "moon")
COLOURS = ("red", "green", "blue", "yellow", "purple", "white")
PROMPTS = [f"a {colour} {subject} rising over the sea" for colour in COLOURS for subject in SUBJECTS]
BAD = [{"prompt": PROMPT, "fames": 8}, {"prompt": PROMPT, "frames": "many"}, {"prompt": "  "}]
# One chunk, not refined: what matters here is which jobs run.
ONE_CHUNK = [*TINY, "--frames", "12", "--no-refine"]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parsed(text: str) -> list[dict[str, Any]]:
    """The events on stdout, each as the published schema says."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    events = [json.loads(line) for line in text.splitlines()]
    for event in events:
        validator.validate(event)
    return events


def results(events: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results by job; the last line is the only one of the whole batch."""
    found = [event for event in events if event["type"] == "result"]
    assert ["jobs" in event for event in found] == [False] * (len(found) - 1) + [True]
    assert events[-1] == found[-1]
    return {event["job"]: event for event in found[:-1]}


def check(
    place: Path, folder: Path, shard: str = "1/1", overwrite: bool = False, **shared: Any
) -> tuple[list[tasks.Task], list[tasks.Refusal]]:
    """Read and check a file with options of the command line."""
    none = dict.fromkeys(("model", "preset", "quality", "config_file", "settings", "size"))
    for_all = tasks.Shared(folder, {**none, **shared}, {"threads": 1}, overwrite)
    return tasks.check(rows.read(str(place)), for_all, tasks.shard_of(shard))


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Job], None]], list[Job]]:
    """Let another function stand for the making of a video; it is told the job."""

    def replace(act: Callable[[Job], None]) -> list[Job]:
        begun: list[Job] = []

        def run(job: Job, report: Any, loaded: Any) -> Result:
            begun.append(job)
            act(job)
            return Result.of(job, 2, 2, 1.0)

        monkeypatch.setattr(pipeline, "run", run)
        return begun

    return replace


# ------------------------------------------------------------------------------------------------------------ reading


TOML = """
# two jobs
[[jobs]]
prompt = "a red ball"
frames = 9
no-refine = true
[[jobs]]
id = "second"
prompt = "a blue star"
refine.chunk = 12
"""
WRITTEN = {
    "jobs.jsonl": '{"prompt": "a red ball", "frames": 9, "no-refine": true, "seed": null}\n\n'
    '{"id": "second", "prompt": "a blue star", "refine": {"chunk": 12}}\n',
    "jobs.toml": TOML,
    "jobs.csv": "prompt,frames,no-refine,id,refine.chunk\na red ball,9,true,,\na blue star,,,second,12\n",
}


@pytest.mark.parametrize(("name", "lines"), [("jobs.jsonl", [1, 3]), ("jobs.toml", [3, 7]), ("jobs.csv", [2, 3])])
def test_every_format_says_the_same(name: str, lines: list[int], tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" * (name != "jobs.toml") + WRITTEN[name].replace("\n", "\r\n").encode())
    tasks, refusals = check(path, tmp_path / "out", frames=20)
    assert refusals == []
    assert [(task.id, task.line) for task in tasks] == [("a-red-ball", lines[0]), ("second", lines[1])]
    first, second = (task.job.config for task in tasks)
    assert (first.prompt, first.num_frames, first.refine.enabled) == ("a red ball", 9, False)
    assert (second.prompt, second.num_frames, second.refine.chunk) == ("a blue star", 20, 12)
    assert tasks[1].job.output == tmp_path / "out" / "second.mp4"


def test_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red ball\n\n  a blue star \na red ball\n")
    tasks, _ = check(path, tmp_path)
    assert [task.id for task in tasks] == ["a-red-ball", "a-blue-star", "a-red-ball-2"]
    assert [task.job.config.prompt for task in tasks] == ["a red ball", "a blue star", "a red ball"]


@pytest.mark.parametrize("text", ["a red ball\na blue star\n", '{"prompt": "a red ball"}\n{"prompt": "a blue star"}'])
def test_standard_input(text: str, tmp_path: Path) -> None:
    process = subprocess.run(
        [os.sys.executable, "-m", "streamt2v", "batch", "-", "--out-dir", str(tmp_path / "out"), "--frames", "0"],
        input=text, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.count("num_frames is 0") == 2


@pytest.mark.parametrize(
    ("name", "text", "code", "said"),
    [
        ("jobs.yaml", "a: 1", 2, "known: .jsonl"),
        ("jobs.jsonl", "\n\n", 2, "holds no jobs"),
        ("jobs.toml", "[[job]]\nprompt = 'x'", 2, "'job' is not known"),
        ("jobs.toml", "jobs = [1]", 2, "does not look like"),
        ("jobs.toml", "[[jobs]]\nprompt = = 1", 2, "line 2"),
        ("jobs.csv", "prompt,prompt\na,b\n", 2, "same name"),
        ("jobs.csv", 'prompt\n"a red ball\n', 2, "cannot be read as csv"),
        ("none.txt", None, 3, "none.txt"),
    ],
)
def test_files_that_hold_no_jobs(
    name: str, text: str | None, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    assert call("batch", tmp_path / name, "--out-dir", tmp_path / "out", "--json") == code
    captured = capsys.readouterr()
    [event] = parsed(captured.out)
    assert event["error"]["exit_code"] == code
    assert said in event["error"]["message"] + event["error"]["hint"]
    assert said in captured.err
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- checking

MISTAKES = [
    ('{"prompt": "a", "fames": 8}', "fames", "did you mean 'frames'"),
    ('{"prompt": "a", "stream.etta": 1}', "stream.etta", "did you mean 'stream.eta'"),
    ('{"prompt": "a", "resume": true}', "resume", "unknown field"),
    ('{"prompt": "a", "frames": 0}', "frames", "frames is 0"),
    ('{"prompt": "a", "frames": "many"}', "frames", "'many'"),
    ('{"prompt": "a", "frames": 2.5}', "frames", "of type int"),
    ('{"prompt": "a", "fps": NaN}', "fps", "finite"),
    ('{"prompt": "a", "size": "big"}', "size", "1280x720"),
    ('{"prompt": "a", "fit": "wide"}', "fit", "contain"),
    ('{"prompt": "a", "quality": "superb"}', "", "balanced"),
    ('{"prompt": "a", "no-refine": "perhaps"}', "no-refine", "true or false"),
    ('{"prompt": "a", "threads": 0}', "threads", "threads is 0"),
    ('{"prompt": "a", "memory": -1}', "memory", "memory is -1"),
    ('{"prompt": "a", "device": 3}', "device", "of type str"),
    ('{"prompt": "a", "device": "banana"}', "", "banana"),
    ('{"prompt": "a", "model": "dmeo"}', "", "did you mean 'demo'"),
    ('{"prompt": "a", "image": "none.png"}', "image", "none.png"),
    (f'{{"prompt": "a", "image": "{"x" * 5000}"}}', "", "too long"),
    (f'{{"prompt": "a", "init": "{"x" * 5000}"}}', "", "too long"),
    ('{"prompt": "a", "config": "none.toml"}', "", "none.toml"),
    ('{"prompt": "a", "preview": "sheet.gif"}', "", ".png"),
    ('{"prompt": "a", "preview": "../sheet.png"}', "preview", "'../sheet.png'"),
    ('{"prompt": "a", "output": "a.avi"}', "", ".mp4"),
    ('{"prompt": "a", "output": 7}', "output", "of type str"),
    ('{"prompt": "a", "id": "good"}', "id", "line 1"),
    ('{"prompt": "a", "id": "GOOD"}', "id", "line 1"),
    ('{"prompt": "a", "output": "Good.mp4"}', "id", "line 1"),
    ('{"prompt": "a", "preview": "Good.png"}', "preview", "line 1"),
    ('{"prompt": "a", "refine": {"chunk": 4, "overlap": 4}}', "", "overlap is 4"),
    ('{"prompt": " "}', "prompt", "empty"),
    ('{"prompt": ["a"]}', "prompt", "of type str"),
    (r'{"prompt": "\ud800"}', "", "not valid text"),
    ("{}", "prompt", "empty"),
    ('["a"]', "", "does not look like"),
    ('{"prompt": ', "", "not a JSON object"),
    ("[" * 9000, "", "not a JSON object"),
]


@pytest.mark.parametrize(("line", "field", "said"), MISTAKES)
def test_a_bad_row_names_line_and_field(line: str, field: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text(f'{{"id": "good", "prompt": "a", "preview": "good.png"}}\n{line}\n')
    [task], [refusal] = check(path, tmp_path / "out")
    assert task.id == "good"
    assert (refusal.line, refusal.field) == (2, field)
    assert said in refusal.error.message + refusal.error.hint
    assert list((tmp_path / "out").iterdir()) == []


def test_a_row_may_hold_every_option_of_generate() -> None:
    """But for those of the whole batch; `id` and `output` name the row and its video."""
    command: Any = typer.main.get_command(app.app)
    names = [[name for name in option.opts if name[:2] == "--"] for option in command.commands["generate"].params]
    options = {long[0] for long in names if long}  # the others are aliases
    of_the_batch = {"output", "overwrite", "resume", "resume-anyway", "json", "quiet", "verbose", "set"}
    of_the_batch |= {"count", "dry-run"}
    wanted = {name[2:] for name in options} - of_the_batch
    assert wanted <= set(asked.row_fields())
    assert set(asked.row_fields()) <= wanted | set(config.describe())


def test_a_row_may_turn_to_other_prompts(tmp_path: Path) -> None:
    path = tmp_path / "jobs.jsonl"
    path.write_text('{"prompt": "a", "frames": 64, "at": ["24=b", "6s=c"]}\n')
    [task], refused = check(path, tmp_path)
    assert refused == []
    assert task.job.config.prompts == {24: "b", 48: "c"}


def test_a_bad_row_of_a_table_of_text(tmp_path: Path) -> None:
    path = tmp_path / "jobs.csv"
    path.write_text('prompt,frames\n"a\nb",8\na,many\na,8,9\n')
    [task], [first, second] = check(path, tmp_path)
    assert task.line == 2
    assert (first.line, first.field) == (4, "frames")
    assert (second.line, "cell 3 is in a column without a name" in second.error.message) == (5, True)


NAMES = [
    "../x", "..", ".", "/etc/x", "//x", "a/../../x", "a//b", "a/", "link/x", "~/../../x/..", "C:x", "C:\\x", "a\\b",
    "\\\\host\\x", "con", "CON", "nul.txt", "a/aux", "com1", "lpt9.tar", "a\0b", "a\nb", "a\x1bb", "a\x7fb", "a<b",
    "a|b", "a?b", "a*b", 'a"b', "a:b", "x" * 300, "\u044f" * 150, "trailing./x", "trailing /x", " /x", "a/./b",
    "a/.. /b", "prn.", "./x", "sub/../x", "\ud800",
]  # fmt: skip


@pytest.mark.parametrize("field", ["id", "output", "preview"])
def test_nothing_is_written_outside_of_the_folder(field: str, tmp_path: Path) -> None:
    assert len(NAMES) >= 40
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    ending = {"id": "", "output": ".mp4", "preview": ".png"}[field]
    rows = [{"prompt": "a", field: name if name.endswith((".", "/")) else name + ending} for name in NAMES]
    tasks, refusals = check(jsonl(tmp_path / "jobs.jsonl", rows), folder)
    # With its ending a device's name is still one; a name of dots alone may become a good one.
    made = [task.job.output if field != "preview" else task.job.preview for task in tasks]
    assert all(path.resolve().is_relative_to(folder.resolve()) for path in made if path)
    assert len(tasks) <= 3 and len(tasks) + len(refusals) == len(NAMES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "jobs.jsonl", "out"]
    assert list(elsewhere.iterdir()) == []


def test_the_row_wins_and_what_it_does_not_say_holds_for_all(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "refine.num_inference_steps": 5, "stream.guidance_scale": 3.0, "model": "demo"},
        {"prompt": "b", "steps": 6, "size": "64x32", "no-refine": False, "threads": 2, "keep-run": True},
        {"prompt": "c"},
    ]
    path = jsonl(tmp_path / "jobs.jsonl", rows)
    shared = {"refine_steps": 2, "guidance": 2.0, "steps": 4, "size": "80x48", "no_refine": True, "frames": 9}
    first, second, third = check(path, tmp_path, **shared)[0]
    a, b, c = (task.job.config for task in (first, second, third))
    assert (a.refine.num_inference_steps, a.stream.guidance_scale) == (5, 3)
    assert (a.initialize.guidance_scale, a.num_frames, a.refine.enabled) == (2, 9, False)
    assert (b.stream.num_inference_steps, b.output.width, b.output.height, b.refine.enabled) == (6, 64, 32, True)
    assert (second.job.threads, second.job.keep_run, third.job.threads) == (2, True, 1)
    assert (c.stream.num_inference_steps, c.output.width, c.refine.num_inference_steps) == (4, 80, 2)


def test_seeds_stay_and_differ(tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS] + [{"prompt": PROMPTS[0]}, {"prompt": "x", "seed": 3}]
    path = jsonl(tmp_path / "jobs.jsonl", rows)
    seeds = [task.job.config.seed for task in check(path, tmp_path)[0]]
    assert seeds == [task.job.config.seed for task in check(path, tmp_path)[0]]
    assert len(set(seeds)) == len(rows)
    assert seeds[-1] == 3
    jsonl(path, rows[:24][::-1])
    assert [task.job.config.seed for task in check(path, tmp_path)[0]] == seeds[:24][::-1]
    jsonl(path, rows)
    assert {task.job.config.seed for task in check(path, tmp_path, seed=5)[0]} == {5, 3}


def test_shards_share_the_rows(tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS] + BAD
    path = jsonl(tmp_path / "jobs.jsonl", rows)
    parts = [check(path, tmp_path, shard=f"{part}/4") for part in (1, 2, 3, 4)]
    assert sorted(task.line for tasks, _ in parts for task in tasks) == list(range(1, 25))
    assert sorted(refusal.line for _, refusals in parts for refusal in refusals) == [25, 26, 27]
    assert {len(tasks) + len(refusals) for tasks, refusals in parts} == {6, 7}
    whole = {task.id: task.job for task in check(path, tmp_path)[0]}
    assert all(whole[task.id] == task.job for tasks, _ in parts for task in tasks)
    for nonsense in ("0/2", "3/2", "1", "a/b", "1/2/3", ""):
        with pytest.raises(errors.ConfigError, match="1/4"):
            tasks.shard_of(nonsense)


def yardstick() -> float:
    """Processor time of a piece of work that takes a twelfth of a second where nothing else is done."""
    began = time.process_time()
    for number in range(60_000):
        json.dumps({"prompt": str(number), "frames": number})
    return time.process_time() - began


def test_a_thousand_rows_in_two_seconds(tmp_path: Path) -> None:
    """On a machine as fast as that; other programs on the same core slow down both."""
    rows = [{"prompt": PROMPTS[k % 24], "frames": 24 + k, "size": "80x48", "stream.eta": 0.5} for k in range(997)]
    path = jsonl(tmp_path / "jobs.jsonl", rows + BAD)
    seconds, usual = [], []
    for _ in range(3):
        usual.append(yardstick())
        began = time.process_time()
        tasks, refusals = check(path, tmp_path / "out", steps=2)
        seconds.append(time.process_time() - began)
        if min(seconds) <= 24 * min(usual):
            break
    assert min(seconds) <= 24 * min(usual)
    assert (len(tasks), len(refusals)) == (997, 3)


# ------------------------------------------------------------------------------------------------------------ running


def test_bad_rows_stop_all_or_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_runs: Any) -> None:
    begun = fake_runs(lambda job: None)
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": "a red ball"}, *BAD])
    command = ["batch", path, "--out-dir", tmp_path / "out", "--json", "--device", "cpu"]
    assert call(*command) == 2
    captured = capsys.readouterr()
    events = parsed(captured.out)
    assert [(event["line"], event["field"]) for event in results(events).values()] == [
        (2, "fames"), (3, "frames"), (4, "prompt")
    ]  # fmt: skip
    assert (events[-1]["error"]["code"], events[-1]["left"], begun) == ("config", 1, [])
    assert [line[:14] for line in captured.err.splitlines() if line.startswith("error: line")] == [
        "error: line 2:", "error: line 3:", "error: line 4:"
    ]  # fmt: skip
    assert call(*command, "--keep-going", "--quiet") == 9
    captured = capsys.readouterr()
    events = parsed(captured.out)
    assert [event["type"] for event in events] == ["result"] * 3 + ["start"] + ["result"] * 2
    assert (events[-1]["made"], events[-1]["failed"], events[-1]["error"]["code"]) == (1, 3, "batch")
    assert "a red ball" not in captured.err


def test_a_failure_stops_the_batch_unless_it_keeps_going(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fake_runs: Any
) -> None:
    failures = {
        "b": errors.OutputError("no space left", "free some"), "c": MemoryError(), "d": ZeroDivisionError("oh")
    }  # fmt: skip

    def fail(job: Job) -> None:
        if error := failures.get(job.config.prompt):
            raise error

    begun = fake_runs(fail)
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": name} for name in "abcde"])
    command = ["batch", path, "--out-dir", tmp_path / "out"]
    assert call(*command, "--json", "--quiet") == 9
    events = parsed(capsys.readouterr().out)
    assert [job.config.prompt for job in begun] == ["a", "b"]
    assert (events[-1]["made"], events[-1]["failed"], events[-1]["left"]) == (1, 1, 3)
    assert call(*command, "--json", "--keep-going") == 9
    captured = capsys.readouterr()
    found = results(parsed(captured.out))
    codes = {job: result["error"]["code"] for job, result in found.items() if not result["ok"]}
    assert codes == {"b": "output", "c": "memory", "d": "unexpected"}
    assert "error: line 2: no space left" in captured.err
    assert "5 jobs failed" in captured.err
    assert call(*command, "--quiet", "--keep-going") == 9
    out = str(tmp_path / "out")
    assert capsys.readouterr().out.splitlines() == [f"{out}/a.mp4", f"{out}/e.mp4"]


def test_networks_are_loaded_once_and_what_is_there_is_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    load = weights.load

    def spy(family: Any, role: str, *more: Any) -> Any:
        loaded.append(str(family.path(role)))
        return load(family, role, *more)

    monkeypatch.setattr(weights, "load", spy)
    here.still_loaded.cache_clear()
    rows = [{"prompt": prompt, "frames": 20} for prompt in PROMPTS[:2]]
    path, out = jsonl(tmp_path / "jobs.jsonl", rows), tmp_path / "out"
    command = ["batch", path, "--out-dir", out, *TINY]
    assert call(*command, "--json") == 0
    found = results(events := parsed(capsys.readouterr().out))
    assert [result["status"] for result in found.values()] == ["made", "made"]
    assert {event["stage"] for event in events if event["type"] == "chunk"} == {"stream", "refine"}
    assert len(loaded) == len(set(loaded)) > 5  # by the first job; nothing by the second
    # The second one is the same as alone.
    assert call("generate", PROMPTS[1], "--frames", 20, "-o", tmp_path / "alone.mp4", *TINY) == 0
    assert digest(tmp_path / "alone.mp4") == digest(out / "a-red-star-rising-over-the-sea.mp4")
    capsys.readouterr()

    before, loads = {file: file.stat().st_mtime_ns for file in out.iterdir()}, len(loaded)
    left = run_directory.directory_for(next(iter(before))) / "state"  # by a process that was killed at its very end
    left.mkdir(parents=True)
    (left.parent / "lock").touch()
    assert call(*command, "--json") == 0
    assert not left.parent.exists()
    events = parsed(capsys.readouterr().out)
    assert [result["status"] for result in results(events).values()] == ["there", "there"]
    assert len(events) == 3 and len(loaded) == loads

    jsonl(path, [rows[0], {**rows[1], "frames": 12}])
    assert call(*command) == 2
    assert "config.num_frames = 20, now it is 12" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    assert call(*command, "--overwrite", "--json") == 0
    assert [result["status"] for result in results(parsed(capsys.readouterr().out)).values()] == ["there", "made"]
    assert sum(file.stat().st_mtime_ns != before.get(file) for file in out.iterdir()) == 1
    assert digest(out / "a-red-star-rising-over-the-sea.mp4")[0] == 12


def test_a_stopped_run_goes_on_with_its_own_settings_only(tmp_path: Path) -> None:
    path, out = jsonl(tmp_path / "jobs.jsonl", [{"id": "x", "prompt": "a"}]), tmp_path / "out"
    [task], _ = check(path, out)
    run_directory.RunDirectory.open(task.job.run_path, Prepared(task.job).recipe(), resume=False).close()
    [task], _ = check(path, out)
    assert (task.job.resume, task.job.overwrite) == (True, False)
    [task], _ = check(path, out, overwrite=True)
    assert (task.job.resume, task.job.overwrite) == (True, True)
    for damage, said in ((None, 'config.prompt = "a", now it is "b"'), ("{", "cannot be read")):
        jsonl(path, [{"id": "x", "prompt": "b"}])
        if damage:
            (task.job.run_path / "run.json").write_text(damage)
        _, [refusal] = check(path, out)
        assert said in refusal.error.message and "--overwrite" in refusal.error.hint
        [task], _ = check(path, out, overwrite=True)
        assert (task.job.resume, task.job.overwrite) == (False, True)


def test_a_row_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether its output is there, has other settings or is yet to be made."""
    path, out, looked = jsonl(tmp_path / "jobs.jsonl", [{"id": "x", "prompt": "a"}]), tmp_path / "out", list[object]()
    choose = prepared.choose.choose
    monkeypatch.setattr(prepared.choose, "choose", lambda *given: [looked.append(given[1]), choose(*given)][1])
    [task], _ = check(path, out)
    made(task.job.output, 4, json.dumps({"streamt2v": "0.0.1", **Prepared(task.job).recipe()}))
    for other, overwrite in (([{"id": "x", "prompt": "a"}], False), ([{"id": "x", "prompt": "b"}], True)):
        looked.clear()
        [task], _ = check(jsonl(path, other), out, overwrite=overwrite)
        assert (task.made is None) == overwrite
        assert len(looked) == 1


def test_what_is_no_video_of_ours_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.mp4").write_text("precious")
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    assert call("batch", path, "--out-dir", tmp_path) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert call("batch", path, "--out-dir", tmp_path / "a.mp4") == 5
    assert "is not a folder" in capsys.readouterr().err
    assert call("batch", path, "--out-dir", tmp_path, "--keep-going") == 9
    assert "correct the invalid rows" in capsys.readouterr().err
    assert (tmp_path / "a.mp4").read_text() == "precious"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str]:
    """What the second of the next test's jobs makes by itself."""
    path = tmp_path_factory.mktemp("alone") / "out.mp4"
    assert call("generate", PROMPTS[1], "--frames", 26, "-o", path, *TINY) == 0
    return digest(path)


class Two:
    """A batch of two jobs that is stopped and given again."""

    def __init__(self, folder: Path) -> None:
        rows = [{"prompt": prompt, "frames": 26} for prompt in PROMPTS[:2]]
        self.path, self.out = jsonl(folder / "jobs.jsonl", rows), folder / "out"
        self.command = ["batch", self.path, "--out-dir", self.out, *TINY, "--json"]

    def stop(
        self, sent: signal.Signals, code: int, *more: str, in_job: str = "", within: float = 30
    ) -> list[dict[str, Any]]:
        """Send a signal after the first chunk of a job, of any by default; return the events."""
        process = start(*self.command, *more)
        assert process.stdout
        events = []
        for line in process.stdout:
            events += parsed(line)
            if events[-1]["type"] == "chunk" and events[-1]["job"].startswith(in_job):
                process.send_signal(sent)
                break
        rest, said = process.communicate(timeout=within)
        assert process.returncode == code
        assert "Traceback" not in said
        return events + parsed(rest)

    def go_on(self, alone: tuple[int, str], capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
        """Give the same command again, here and without Ray; return its events."""
        assert call(*self.command) == 0
        assert digest(self.out / "a-red-star-rising-over-the-sea.mp4") == alone
        assert sorted(file.suffix for file in self.out.iterdir()) == [".mp4", ".mp4"]  # neither run nor partial file
        return parsed(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("sent", "code"),
    [(signal.SIGINT, 130), (signal.SIGKILL, -9), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_batch_that_is_stopped_goes_on(
    sent: signal.Signals, code: int, alone: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = Two(tmp_path)
    events = two.stop(sent, code, in_job="a-red-star")
    if code > 0:
        assert (events[-1]["error"]["code"], events[-1]["exit_code"], events[-1]["left"]) == ("interrupted", code, 1)
    events = two.go_on(alone, capsys)
    assert [result["status"] for result in results(events).values()] == ["there", "made"]
    assert any(event["done"] >= 16 for event in events if event["type"] == "progress")  # goes on, not anew


def test_a_reader_that_goes_away_ends_the_batch_quietly(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:3]])
    process = start("batch", path, "--out-dir", tmp_path / "out", *ONE_CHUNK, "--json")
    with process:
        assert process.stdout and process.stderr
        assert parsed(process.stdout.readline())
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 141
    assert said == ""


# --------------------------------------------------------------------------------------------------------------- JSON


def failing(path: Path) -> Iterator[list[object]]:
    """Command lines that fail, each in another way."""
    (path / "odd.mp4").write_bytes(b"no video")
    (path / "there.mp4").write_text("precious")
    yield ["generate", "a red ball", "--resume"]
    for more in (
        ["--frames", 0], ["--fps", 0], ["--size", "big"], ["--model", "dmeo"], ["--set", "stream.etta=1"],
        ["--set", "nonsense"], ["--preset", "dmeo"], ["--config", "none.toml"], ["--image", path / "none.png"],
        ["-o", "out.avi"], ["-o", path / "nowhere" / "x.mp4"], ["-o", path / "there.mp4"], ["-o", path],
        ["--device", "banana"], ["--preview", path / "x.gif"], ["--init", "modelskope"],
        ["--chunk", 4, "--overlap", 9],
    ):  # fmt: skip
        yield ["generate", "a red ball", "-o", path / "x.mp4", *more]
    yield ["generate", " "]
    for command in (["refine"], ["extend", "--frames", 40]):
        for source in ("none.mp4", "odd.mp4", "."):
            yield [*command, path / source]


def test_every_line_of_thirty_runs_is_as_published(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    codes = []
    for arguments in failing(tmp_path):
        code = call(*arguments, "--json")
        captured = capsys.readouterr()
        [event] = parsed(captured.out)
        assert (event["ok"], event["error"]["exit_code"]) == (False, code)
        assert captured.err.startswith(f"error: {event['error']['message'][:20]}")
        codes.append(code)
    first = tmp_path / "first.mp4"
    for arguments in (
        ["generate", PROMPT, "--frames", 16, "-o", first, *TINY, "--no-refine"],
        ["generate", PROMPT, "--frames", 16, "-o", first, *TINY, "--no-refine", "--resume"],
        ["resume", first],
        ["refine", first, "--refine-steps", 1, "--size", "80x48"],
        ["extend", first, "--frames", 20, *TINY, "--no-refine"],
        ["batch", jsonl(tmp_path / "jobs.jsonl", [{"prompt": "a red ball"}]), "--out-dir", tmp_path, *ONE_CHUNK],
    ):  # fmt: skip
        codes.append(call(*arguments, "--json"))
        events = parsed(capsys.readouterr().out)
        assert events[-1]["ok"] and events[-1]["type"] == "result"
        assert [event for event in events if event["type"] == "result" and "job" not in event] == events[-1:]
    assert len(codes) >= 30
    assert set(codes) == {0, 2, 3, 5}


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"schema": "streamt2v.event/1", "type": "news"},
        {"schema": "streamt2v.event/2", "type": "warning", "message": "x"},
        {"schema": "streamt2v.event/1", "type": "result"},
        {"schema": "streamt2v.event/1", "type": "result", "ok": True},
        {"schema": "streamt2v.event/1", "type": "result", "ok": False},
        {"schema": "streamt2v.event/1", "type": "result", "ok": False, "error": {"code": "x"}},
        {"schema": "streamt2v.event/1", "type": "start", "job": "a"},
        {"schema": "streamt2v.event/1", "type": "chunk", "job": "a", "stage": "x", "done": 1, "chunk": 1, "chunks": 1},
    ],
)
def test_the_schema_refuses_what_is_none(event: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(event, SCHEMA)


# ------------------------------------------------------------------------------------------------------------- on Ray


@pytest.mark.parametrize(
    ("arguments", "address"),
    [
        (["--ray"], "local"),
        (["--ray", "--quiet"], "local"),
        (["--ray", "auto"], "auto"),
        (["--ray", "10.0.0.1:6379"], "10.0.0.1:6379"),
        (["--ray=ray://head:10001"], "ray://head:10001"),
        ([], None),
    ],
)
def test_the_address_may_be_left_out(
    arguments: list[str], address: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(run, "run", lambda *_, ray, **__: asked.append(ray) or 0)
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    assert call("batch", *arguments, path, "--out-dir", tmp_path) == 0
    assert call("batch", path, "--out-dir", tmp_path, *arguments) == 0
    assert asked == [address, address]


def test_without_ray_it_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": "a"}])
    assert call("batch", path, "--out-dir", tmp_path, "--ray", "--json") == 2
    [event] = parsed(capsys.readouterr().out)
    assert 'pip install ".[ray]"' in event["error"]["hint"]


def test_what_ray_keeps_for_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "a"}, {"prompt": "b", "memory": 30}, {"prompt": "c", "device": "cpu", "threads": 3},
        {"prompt": "d", "device": "cuda:1"}, {"prompt": "e", "memory": 9},
    ]  # fmt: skip
    whole, large, cpu, named, small = check(jsonl(tmp_path / "jobs.jsonl", rows), tmp_path)[0]
    assert on_ray._placed(whole, has_gpu=False) == (whole, {"num_cpus": 1})
    assert on_ray._placed(cpu, has_gpu=True) == (cpu, {"num_cpus": 3})
    with pytest.raises(errors.ConfigError, match="cuda:1"):
        on_ray._placed(named, has_gpu=True)
    monkeypatch.setattr(devices, "glance", lambda: devices.Glance("cpu", 64 * 10**9))
    assert on_ray._placed(small, has_gpu=True) == (small, {"num_cpus": 1, "num_gpus": 1})
    monkeypatch.setattr(devices, "glance", lambda: devices.Glance("cuda", 40 * 10**9))
    assert on_ray._placed(large, has_gpu=True) == (large, {"num_cpus": 1, "num_gpus": 1})
    task, resources = on_ray._placed(small, has_gpu=True)
    assert (resources, task.job.memory) == ({"num_cpus": 1, "num_gpus": 0.25}, 10)
    task, resources = on_ray._placed(whole, has_gpu=True)
    assert resources["num_gpus"] < 0.5
    assert task.job.memory == pytest.approx(40 * resources["num_gpus"], rel=0.01)


@pytest.mark.timeout(600)
@needs_ray
def test_two_ray_workers_make_the_same_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = jsonl(tmp_path / "jobs.jsonl", [{"prompt": prompt} for prompt in PROMPTS[:2]] + BAD[:1])
    command = ["batch", path, *ONE_CHUNK, "--keep-going", "--json", "--out-dir"]
    assert call(*command, tmp_path / "here") == 9
    here = results(parsed(capsys.readouterr().out))
    with start(*command, tmp_path / "ray", "--ray") as process:
        try:
            out, said = process.communicate(timeout=500)
        finally:
            process.kill()  # no effect if it has ended
    assert process.returncode == 9, said
    events = parsed(out)
    assert len({event["pid"] for event in events if event["type"] == "start"}) == min(2, devices.usable_cpus())
    there = results(events)
    assert sorted(there) == sorted(here)
    for job, result in there.items():
        assert result["ok"] == here[job]["ok"]
        assert not result["ok"] or digest(Path(result["output"])) == digest(Path(here[job]["output"]))


# --------------------------------------------------------------------------------------------------------------- deep

THIRTY = [{"prompt": prompt, "id": f"job{index}"} for index, prompt in enumerate([*PROMPTS, *PROMPTS[:3]])]


@pytest.fixture(scope="module")
def thirty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, str]]]:
    """A file of 27 jobs and 3 bad rows, and what each job makes."""
    folder = tmp_path_factory.mktemp("thirty")
    rows: list[dict[str, Any]] = [*THIRTY]
    for place, row in zip((3, 11, 29), BAD, strict=True):
        rows.insert(place, {**row, "id": f"bad{place}"})
    path = jsonl(folder / "jobs.jsonl", rows)
    process = start("batch", path, "--out-dir", folder / "out", *TINY, "--frames", 20, "--keep-going", "--json")
    out, said = process.communicate(timeout=280)
    assert process.returncode == 9
    events = parsed(out)
    found = results(events)
    assert sum(result["ok"] for result in found.values()) == 27
    assert sorted(result["line"] for result in found.values() if not result["ok"]) == [4, 12, 30]
    assert said.count("error: line") == 3
    assert len(list((folder / "out").glob("*.mp4"))) == 27
    return path, {job: digest(Path(result["output"])) for job, result in found.items() if result["ok"]}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_jobs_killed_at_random(thirty: tuple[Path, dict[str, tuple[int, str]]], tmp_path: Path) -> None:
    path, whole = thirty
    chance, made, kills = random.Random(20), dict[str, int](), 0
    command = ["batch", path, "--out-dir", tmp_path, *TINY, "--frames", 20, "--keep-going", "--json"]
    while True:
        process = start(*command)
        assert process.stdout
        after, lines = chance.randrange(12, 40), 0
        for line in process.stdout:
            for event in parsed(line):
                if event["type"] == "result" and event.get("status") == "made":
                    made[event["job"]] = made.get(event["job"], 0) + 1
            lines += "there" not in line
            if lines == after:
                time.sleep(chance.random() / 10)
                process.kill()
                break
        process.communicate(timeout=60)
        if process.returncode == 9:
            break
        kills += 1
    assert kills >= 3
    assert set(made.values()) == {1}  # finished ones are not made again
    assert {file.stem: digest(file) for file in tmp_path.iterdir()} == whole
    print(f"{kills} kills, {len(made)} jobs")


@pytest.mark.slow
@pytest.mark.timeout(900)
@needs_ray
def test_ray_workers_killed_in_the_middle(thirty: tuple[Path, dict[str, tuple[int, str]]], tmp_path: Path) -> None:
    path, whole = thirty
    command = ["batch", path, "--out-dir", tmp_path, *TINY, "--frames", 20, "--keep-going", "--json", "--ray"]
    process = start(*command)
    assert process.stdout
    workers, chunks, killed = dict[str, int](), 0, list[str]()
    events = []
    for line in process.stdout:
        [event] = parsed(line)
        events.append(event)
        if event["type"] == "start":
            workers[event["job"]] = event["pid"]
        chunks += event["type"] == "chunk"
        begun = event["type"] == "chunk" and event["stage"] == "stream" and event["chunk"] == 1
        if begun and chunks % 5 == 0 and event["job"] not in killed:
            os.kill(workers[event["job"]], signal.SIGKILL)
            killed.append(event["job"])
    process.communicate(timeout=60)
    assert process.returncode == 9
    assert len(killed) >= 3
    assert sum(result["ok"] for result in results(events).values()) == 27
    assert {file.stem: digest(file) for file in tmp_path.iterdir()} == whole
    print(f"{len(killed)} workers killed: {killed}")


@pytest.mark.slow
@needs_ray
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_batch_on_ray_that_is_stopped_goes_on(
    sent: signal.Signals, code: int, alone: tuple[int, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = Two(tmp_path)
    events = two.stop(sent, code, "--ray", within=10)
    assert events[-1]["error"]["code"] == "interrupted"
    began, workers = time.monotonic(), [Path(f"/proc/{event['pid']}") for event in events if event["type"] == "start"]
    while any(worker.exists() for worker in workers):  # Ray ends them after it was told
        assert time.monotonic() - began <= 20
        time.sleep(0.1)
    assert sum(result["ok"] for result in results(two.go_on(alone, capsys)).values()) == 2
