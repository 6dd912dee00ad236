"""The Dockerfile, as far as that goes without a container engine: its steps, run in an empty folder."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def steps() -> list[tuple[str, str]]:
    """Return (instruction, the rest of it), lines that go on joined."""
    lines = (REPOSITORY / "Dockerfile").read_text("utf-8").replace("\\\n", " ").splitlines()
    found = [line.split(maxsplit=1) for line in lines if line.strip() and not line.startswith("#")]
    return [(instruction, rest) for instruction, rest in found]


def build(folder: Path, path: str, **arguments: str) -> str:
    """Carry out the steps with build arguments; the folder stands for the image's. Return what they printed."""
    place = folder / "src"
    place.mkdir()
    values = {"PREFIX": str(folder / "prefix"), "WEIGHTS": str(folder / "weights"), **arguments}
    defaults = dict(rest.split("=", 1) for instruction, rest in steps() if instruction == "ARG")
    assert set(values) <= set(defaults)
    surroundings = {**defaults, **values, "PATH": path, "HOME": str(folder)}
    surroundings |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
    said = ""
    for instruction, rest in steps():
        if instruction == "COPY":
            *sources, target = rest.split()
            for source in sources:
                origin = REPOSITORY / source
                if origin.is_dir():
                    shutil.copytree(origin, place / target, ignore=shutil.ignore_patterns("__pycache__"))
                else:
                    shutil.copy(origin, place / target)
        elif instruction == "RUN":
            done = subprocess.run(["sh", "-c", rest], cwd=place, env=surroundings, capture_output=True, text=True)
            assert done.returncode == 0, f"{rest}\n{done.stdout}{done.stderr}"
            said += done.stdout
    return said


def test_what_the_build_needs_is_copied() -> None:
    copied = {source for instruction, rest in steps() if instruction == "COPY" for source in rest.split()[:-1]}
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]}
    assert copied == needed | {*wheel["packages"], *wheel["force-include"]}
    ignored, *kept, caches = (REPOSITORY / ".dockerignore").read_text("utf-8").split()
    assert (ignored, caches) == ("*", "**/__pycache__")
    assert {name.removeprefix("!") for name in kept} == copied
    assert steps()[-1] == ("ENTRYPOINT", '["streamt2v"]')


@pytest.mark.parametrize("python", ["ready", "too old"])
def test_the_steps_ask_for_what_the_arguments_say(python: str, tmp_path: Path) -> None:
    """Stand-ins on the path write down how they are called; a new environment gets them too."""
    tools, log = tmp_path / "tools", tmp_path / "log"
    tools.mkdir()
    note = f'#!/bin/sh\necho "$(basename "$0") $*" >> {log}\n'
    enough = f"[ {int(python == 'ready')} = 1 ] || [ -e {tmp_path}/newer ]"
    made = f'mkdir -p "$3/bin" && cp {tools}/pip {tools}/streamt2v "$3/bin"'
    scripts = {
        "pip": note,
        "streamt2v": note,
        "apt-get": f"{note}touch {tmp_path}/newer\n",
        "rm": note,
        "python3": f'{note}case "$1" in -c) {enough};; -m) {made};; esac\n',
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    build(tmp_path, f"{tools}:/usr/bin:/bin", TORCH_INDEX="https://index", EXTRAS="[metrics]")
    called = log.read_text("utf-8")
    assert "pip install --no-cache-dir --index-url https://index torch\n" in called
    assert "pip install --no-cache-dir .[metrics]\n" in called
    assert called.endswith("streamt2v weights verify demo\n")
    assert ("apt-get install -y --no-install-recommends python3-venv" in called) == (python == "too old")
    assert (tmp_path / "weights").stat().st_mode & 0o7777 == 0o1777
    shutil.rmtree(tmp_path / "src")
    log.unlink()
    build(tmp_path, f"{tools}:/usr/bin:/bin", TORCH_INDEX="")
    assert re.findall("pip install.*", log.read_text("utf-8")) == ["pip install --no-cache-dir ."]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_steps_in_an_empty_folder_make_a_command_that_makes_a_video(tmp_path: Path) -> None:
    """Installs everything from the package index, torch included; what PIP_CONSTRAINT says of it holds."""
    build(tmp_path, os.environ["PATH"], TORCH_INDEX="")
    made = subprocess.run(
        [tmp_path / "prefix" / "bin" / "streamt2v", "generate", "a red ball over the sea", "--frames", "8", "-q"],
        cwd=tmp_path / "weights", env={"PATH": "/usr/bin:/bin", "STREAMT2V_HOME": str(tmp_path / "weights")}, text=True,
        capture_output=True,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    assert (tmp_path / "weights" / made.stdout.strip()).is_file()
