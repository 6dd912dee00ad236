"""The house: what imports what, what the package may contain, and that the papers agree with the code."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import typer

import streamt2v
from docs import generate_cli
from streamt2v import weights
from streamt2v.cli.app import app

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = Path(streamt2v.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))
HEAVY = ("torch", "diffusers", "transformers", "av", "ray", "imageio_ffmpeg")


@pytest.mark.parametrize(
    "modules",
    [
        "streamt2v",
        "streamt2v.cli.app",
        "streamt2v.cli.doctor, streamt2v.weights, streamt2v.jobs.prepare",
    ],
)
def test_starting_loads_nothing_heavy(modules: str) -> None:
    code = f"import sys, {modules}; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_imports_point_down_only() -> None:
    linter = pytest.importorskip("importlinter.cli")
    code = f"from {linter.__name__} import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_package_stays_small() -> None:
    lines = [line for path in SOURCES for line in path.read_text("utf-8").splitlines() if line.strip()]
    assert len(lines) <= 22_300


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_every_module_says_what_it_is_and_does_nothing_unsafe(path: Path) -> None:
    text = path.read_text("utf-8")
    tree = ast.parse(text)
    assert not tree.body or ast.get_docstring(tree), "a module says what it is"
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            risky = {"pickle", "marshal", "shelve", "dill"} & {name.partition(".")[0] for name in names}
            assert not risky or (path.name == "pickles.py" and risky == {"pickle"} and isinstance(node, ast.Import))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
            assert node.attr in ("Unpickler", "UnpicklingError"), "and that only with a `find_class` of its own"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert called not in ("eval", "exec", "os.system", "yaml.load")
            assert given.get("shell", "False") == "False"
            assert given.get("trust_remote_code", "False") == "False"
            assert called != "torch.load" or given.get("weights_only") == "True"


def test_no_path_of_a_developers_machine_is_named() -> None:
    papers = [
        REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "weights.toml")
    ]
    found = [
        path for path in [*SOURCES, *papers] if re.search(r"(?<![\w.])/(work|root|home)/", path.read_text("utf-8"))
    ]
    assert found == []


def test_the_version_is_the_same_everywhere() -> None:
    assert PROJECT["project"]["version"] == streamt2v.__version__
    assert f"## [{streamt2v.__version__}]" in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")


def test_the_wheel_carries_types_weights_and_presets() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {
        "weights.toml": "streamt2v/weights.toml"
    }
    assert weights.families()
    assert sum(path.stat().st_size for path in (PACKAGE / "demo").iterdir()) <= 40e6


def test_every_dependency_has_a_reason() -> None:
    rows = re.findall(r'^    "([a-z-]+)[^"]*",(.*)$', (REPOSITORY / "pyproject.toml").read_text("utf-8"), re.MULTILINE)
    reasons = {name: note.strip() for name, note in rows}
    names = [re.split(r"[^a-z-]", wanted)[0] for wanted in PROJECT["project"]["dependencies"]]
    assert [name for name in names if not reasons[name].startswith("# ")] == []
    table = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    assert [name for name in names if name not in table] == []


def test_the_commands_of_the_readme_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text("utf-8")
    targets = set(re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text("utf-8"), re.MULTILINE))
    named = set(re.findall(r"[\n`]make ([a-z]+)", readme))
    assert {"video", "test"} <= named <= targets


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links_of_the_pages_exist(page: Path) -> None:
    text, group = page.read_text("utf-8").replace("\\\n", " "), typer.main.get_command(app)
    for line in re.findall(r"^(?:    )?streamt2v (.*)", text, re.MULTILINE):
        command, words = group, shlex.split(line, comments=True)
        while words and words[0] in getattr(command, "commands", {}):
            command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
        known = {name for part in command.params for name in part.opts}
        assert command is not group and known.issuperset(word for word in words if word.startswith("-")), line
    for target in re.findall(r"\]\(([^)#:]+)[)#]", text):
        assert (page.parent / target).exists(), target
    assert not re.search(r"THIS_|YOUR_|example\.(com|org)|\bTBD\b", text)


def test_the_readme_is_read_in_a_minute() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    assert len(text.split()) <= 1320
    for name in re.findall(r"(?:src=\"|\]\()([\w/]+\.(?:webp|gif|png))", text):
        assert (REPOSITORY / name).stat().st_size <= 200_000


def test_the_reference_of_the_command_line_is_fresh() -> None:
    assert generate_cli.PAGE.read_text("utf-8") == generate_cli.page(), "run `make docs`"


def test_the_tree_names_every_module() -> None:
    text = (REPOSITORY / "CONTRIBUTING.md").read_text("utf-8")
    found: set[str] = set()
    room = ""
    for indent, name in re.findall(r"^( {2}|    )([\w/]+(?:\.py|/)) ", text, re.MULTILINE):
        room = "" if len(indent) == 2 else room
        found |= {room + name} if name.endswith(".py") else set()
        room = name if name.endswith("/") else room
    modules = {path.relative_to(PACKAGE).as_posix() for path in SOURCES if not path.name.startswith("__")}
    assert found == modules
