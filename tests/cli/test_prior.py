"""`--init prior`: first frames from an embedding that a prior draws, by the one of the demo."""

import json
from pathlib import Path

import pytest
from PIL import Image

from streamt2v import weights
from streamt2v.errors import NumericsError
from streamt2v.families import streamingt2v
from streamt2v.media import reading
from streamt2v.stages.stream import Streamer
from tests.cli.helpers import PROMPT, TINY, call, digest, generate, result

PRIOR = ["--no-refine", "--init", "prior"]


def test_the_prior_decides_and_a_broken_run_goes_on_exactly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken, own = (tmp_path / f"{name}.mp4" for name in ("whole", "broken", "own"))
    assert generate(whole, 20, *PRIOR, "--json") == 0
    assert result(capsys)["frames"] == 20
    recipe = json.loads(reading.probe(whole).comment)
    assert recipe["config"]["initialize.text_model"] == "prior"
    assert recipe["initializer"] is None
    assert (
        recipe["weights"]["demo/prior.safetensors"]
        == weights.family("demo").file("initialize.prior").parts["demo/prior.safetensors"].sha256
    )
    assert generate(own, 20, "--no-refine") == 0
    assert digest(own) != digest(whole)

    for place, name in ((streamingt2v, "from_image"), (Streamer, "new_frames")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(place, name, _fail)
            assert generate(broken, 20, *PRIOR, "--resume") == 7
    assert generate(broken, 20, *PRIOR, "--resume") == 0
    assert digest(broken) == digest(whole)
    assert generate(tmp_path / "seed.mp4", 20, *PRIOR, "--seed", 8) == 0
    assert digest(tmp_path / "seed.mp4") != digest(whole)
    assert call("rerun", whole, "--device", "cpu", "--quiet") == 0


def _fail(*_: object, **__: object) -> None:
    raise NumericsError("as asked")


def test_a_plan_and_rows_of_a_batch_know_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plan", PROMPT, *PRIOR, "--device", "cpu") == 0
    assert "start    prior" in capsys.readouterr().out
    rows = tmp_path / "jobs.jsonl"
    rows.write_text(json.dumps({"prompt": PROMPT, "init": "prior", "frames": 9}) + "\n")
    assert call("batch", rows, "--out-dir", tmp_path / "out", *TINY[4:], "--no-refine") == 0
    (made,) = (tmp_path / "out").glob("*.mp4")
    assert json.loads(reading.probe(made).comment)["config"]["initialize.text_model"] == "prior"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--image", "PICTURE"], "leave one of them out"),
        (["--set", "loop=ring"], "begins with text alone"),
        (["--set", "initialize.image_guidance_scale=0"], "guidance scale is 0"),
        (["--set", "initialize.guidance_scale=0"], "guidance scale is 0"),
    ],
)
def test_mistakes_are_said_before_anything_loads(
    asked: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "picture.png"
    Image.new("RGB", (64, 36)).save(picture)
    given = [str(picture) if one == "PICTURE" else one for one in asked]
    assert generate(tmp_path / "out.mp4", 20, *PRIOR, *given) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out.mp4").exists()


def test_a_family_without_a_prior_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(tmp_path / "out.mp4", 20, *PRIOR, "--model", "wan", "--offline") == 2
    assert "model wan has no prior" in capsys.readouterr().err
