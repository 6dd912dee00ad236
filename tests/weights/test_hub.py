"""The hub: what is fetched, what resumes, what is refused, and that offline means no connection."""

import json
import random
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamt2v import files, weights
from streamt2v.errors import BusyError, ConfigError, OutputError, StreamT2VError, WeightsError
from streamt2v.weights import convert as converter
from streamt2v.weights import fetch, header, home, hub
from tests import checkpoints as published
from tests.hub_server import COMMIT, Hub, point_library_at, serving

NAME = "streamingt2v"
VIDXTEND, CLIP = "vidxtend.fp16.safetensors", "open_clip_pytorch_model.bin"
REFINER, VAE = "non_ema_0035000.pth", "v2-1_512-ema-pruned.ckpt"
ORDER = [VIDXTEND, CLIP, REFINER, VAE]
Notes = list[str]


def content(name: str, size: int = 60_000) -> bytes:
    return random.Random(name).randbytes(size)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the sources of the family as random bytes, and an empty weights home."""
    repositories: dict[str, dict[str, bytes]] = {}
    for source in family().sources:
        repositories.setdefault(source.repository, {})[source.path] = content(source.path)
    with serving(Hub(repositories)) as running:
        monkeypatch.setenv("STREAMT2V_HOME", str(tmp_path / "home"))
        point_library_at(running.url, tmp_path / "cache", monkeypatch)
        yield running


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection, or asks for an address, fails the test."""

    def refuse(*arguments: object, **_: object) -> Any:
        raise AssertionError(f"a connection was opened: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def family() -> weights.Family:
    return weights.family(NAME)


def convert(source: Path, destination: Path, note: hub.Note) -> list[Path]:
    """Stands in for the converter: what is listed for this source, its bytes behind a name; the UNets in two parts."""
    [row] = [row for row in family().sources if row.path == source.name]
    written = []
    for name in row.makes:
        path = destination.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        parts = [path]
        if path.stem == "unet":
            parts = [path.with_name(f"unet-0000{i}-of-00002.safetensors") for i in (1, 2)] + [header.shard_index(path)]
        for part in parts:
            part.write_bytes(part.name.encode() + source.read_bytes())
        written += parts
    note(f"converted {source.name}")
    return written


def pull(**more: Any) -> Notes:
    notes: Notes = []
    hub.pull(family(), convert, notes.append, **more)
    return notes


def leftovers() -> list[str]:
    """Everything in the downloads folder but locks."""
    found = (home.path() / "downloads").rglob("*")
    return [path.name for path in found if path.is_file() and path.suffix != ".lock"]


# ------------------------------------------------------------------------------------------------------ a whole pull


def test_a_pull_says_sizes_fetches_converts_and_records(server: Hub) -> None:
    before = family()
    assert weights.is_absent(before)
    with pytest.raises(WeightsError, match="not here") as caught:
        weights.require(before)
    assert "weights pull streamingt2v" in caught.value.hint
    notes = pull()
    sizes = [note for note in notes if ": 0.1 MB, " in note]
    assert len(sizes) == len(ORDER)
    assert notes.index("0.2 MB to fetch into " + str(home.path())) < notes.index(f"converted {VIDXTEND}")
    assert sum("CreativeML Open RAIL-M" in note for note in sizes) == 1
    after = family()
    weights.verify(after)
    assert weights.missing(after) == []
    assert weights.default_family() == NAME
    assert leftovers() == []  # once converted, 20 GB are given back
    unet = next(file for file in after.files if file.path == "streamingt2v/stream/unet.safetensors")
    assert [Path(name).name for name in unet.parts] == [
        "unet-00001-of-00002.safetensors", "unet-00002-of-00002.safetensors", "unet.safetensors.index.json",
    ]  # fmt: skip
    assert after.num_bytes > 10 * 60_000
    record = json.loads((home.path() / "weights.lock.json").read_text())
    row = record["sources"][f"benjamin-paine/vidxtend/{VIDXTEND}"]
    assert row["bytes"] == 60_000
    assert row["commit"] == COMMIT
    server.asked.clear()
    assert pull() == []
    assert server.asked == []


def test_what_is_lost_is_pulled_again_and_nothing_else(server: Hub) -> None:
    pull()
    path = family().path("refine.vae")
    path.unlink()
    with pytest.raises(WeightsError, match=r"refine/vae\.safetensors is missing"):
        weights.require(family())
    assert weights.default_family() == "demo"
    server.served.clear()
    pull()
    assert [name for name, *_ in server.served] == [VAE]
    # Damage that keeps size and name is found by its digest, also when a network is loaded.
    path.write_bytes(bytes(path.stat().st_size))
    for look in (weights.verify, lambda chosen: weights.load(chosen, "refine.vae", "cpu", torch.float32)):
        with pytest.raises(WeightsError, match=r"refine/vae\.safetensors is damaged"):
            look(family())
    pull()
    weights.verify(family())


def test_a_published_file_that_changed_is_refused(server: Hub) -> None:
    pull()
    family().path("refine.vae").unlink()
    server.repositories["ali-vilab/MS-Vid2Vid-XL"][VAE] = content("another")
    server.served.clear()
    with pytest.raises(WeightsError, match=r"another .* than the recorded one"):
        pull()
    server.repositories["ali-vilab/MS-Vid2Vid-XL"][VAE] = content("longer", 60_001)
    with pytest.raises(WeightsError, match="60,001 bytes instead of 60,000"):
        pull()
    assert server.served == []


def test_another_copy_can_be_chosen(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsError, match="60,000 bytes instead of 25,568,849,525"):
        pull(choice="original")  # the listed size is compared before a byte is fetched
    assert server.served == []
    with pytest.raises(ConfigError, match="no source 'orignal'") as caught:
        pull(choice="orignal")
    assert "'original'" in caught.value.hint
    monkeypatch.setattr(fetch, "_known", lambda source: (0, "", ""))
    pull()
    pull(choice="original")
    assert "streaming_t2v.ckpt" in [name for name, *_ in server.served]
    stream = next(file for file in family().files if file.path.endswith("stream/cam.safetensors"))
    assert stream.source == "PAIR/StreamingT2V/streaming_t2v.ckpt"
    server.served.clear()
    pull()  # without a choice, what is here will do
    assert server.served == []


def test_only_families_with_sources_are_pulled() -> None:
    with pytest.raises(ConfigError, match="nothing to pull"):
        hub.pull(weights.family("demo"), convert, print)


# -------------------------------------------------------------------------------------------- connections that break


@pytest.mark.parametrize("seed", range(6))
def test_cut_connections_resume_where_they_stopped(server: Hub, seed: int) -> None:
    draw = random.Random(seed)
    server.cuts = [draw.choice([0, 1, 1023, draw.randrange(60_000)]) for _ in range(draw.randrange(1, 9))]
    cuts = len(server.cuts)
    pull()
    weights.verify(family())
    assert family().path("refine.vae").read_bytes() == b"vae.safetensors" + content(VAE)
    sent = sum(length for *_, length in server.served)
    # What comes twice is less than one piece for each cut, and what was written but not sent on.
    assert sent <= 4 * 60_000 + cuts * 1024


def test_a_connection_that_stays_broken_leaves_a_part_that_the_next_pull_uses(server: Hub) -> None:
    server.cuts = [30_000] + [0] * 100
    with pytest.raises(WeightsError, match=r"connection broke at 0\.0 of 0\.1 MB") as caught:
        pull()
    assert "repeat the command" in caught.value.hint
    assert caught.value.exit_code == 4
    [part] = leftovers()
    assert part.startswith(f".{VIDXTEND}.")
    assert weights.is_absent(family())
    server.cuts, server.served = [], []
    notes = pull()
    assert server.starts(VIDXTEND) == [30_000 // 1024 * 1024]
    assert any("continuing at" in note for note in notes)
    weights.verify(family())


def test_a_server_that_ignores_ranges_is_read_from_the_start(server: Hub) -> None:
    server.cuts = [30_000, 20_000]
    server.ranges = False
    pull()
    assert set(server.starts(VIDXTEND)) == {0}
    weights.verify(family())
    assert family().path("refine.vae").read_bytes() == b"vae.safetensors" + content(VAE)


def test_a_flipped_byte_is_refused_and_removed(server: Hub) -> None:
    server.damage = lambda data: data[:777] + bytes([data[777] ^ 4]) + data[778:]
    with pytest.raises(WeightsError, match=f"{VIDXTEND} arrived damaged: its SHA-256 is") as caught:
        pull()
    assert caught.value.exit_code == 4
    assert leftovers() == []
    assert home.recorded("sources") == {}
    server.damage = lambda data: data
    pull()


def test_a_file_that_is_shorter_than_promised_is_refused(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library's own attempts are a second apart
    server.damage = lambda data: data[:-5]
    server.cuts = [None, *[0] * 100]
    with pytest.raises(WeightsError):
        pull()
    assert not any(name in ORDER for name in leftovers())


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((404, "EntryNotFound"), "has no file benjamin-paine/vidxtend/vidxtend"),
        ((404, "RepoNotFound"), "no repository for benjamin-paine/vidxtend"),
        ((404, "RevisionNotFound"), "no such revision"),
        ((403, "GatedRepo"), "accept its terms"),
        ((500, ""), "cannot be fetched from the hub"),
    ],
)
def test_refusals_of_the_hub_are_sentences(server: Hub, refusal: tuple[int, str], said: str) -> None:
    server.refusal = refusal
    with pytest.raises(WeightsError, match=r"hub|terms") as caught:
        pull()
    assert said in caught.value.message
    assert caught.value.exit_code == 4
    assert caught.value.hint or refusal[1] == "RevisionNotFound"
    assert leftovers() == []


def test_no_network_is_said_at_once(server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        point_library_at(f"http://127.0.0.1:{unused.getsockname()[1]}", tmp_path / "cache", monkeypatch)
        with pytest.raises(WeightsError, match=r"cannot be fetched from the hub: .*onnect") as caught:
            pull()
    assert "check the connection" in caught.value.hint


# ---------------------------------------------------------------------------------------------------- disk, processes


def test_a_disk_that_is_too_small_is_said_before_anything_is_fetched(
    server: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "free_bytes", lambda path: 200_000)
    with pytest.raises(OutputError, match="the download needs about 240 kB") as caught:
        pull()
    assert "STREAMT2V_HOME" in caught.value.hint
    assert server.served == []


def test_a_disk_that_fills_up_keeps_the_part(server: Hub) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(OutputError, match="no space left") as caught:
            pull()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "continues where it stopped" in caught.value.hint
    [part] = leftovers()
    assert part.endswith(".part")
    server.served.clear()
    pull()
    assert 0 < server.starts(VIDXTEND)[0] <= 20_000
    weights.verify(family())


def test_the_second_of_two_pulls_is_told_to_wait(server: Hub) -> None:
    server.hold = threading.Event()
    failed: list[StreamT2VError] = []
    first = threading.Thread(target=lambda: failed.extend(_failures(pull)))
    first.start()
    while not any(request.startswith("GET /benjamin-paine/") for request in server.asked):
        assert first.is_alive()
    with pytest.raises(BusyError, match="another process is working on") as caught:
        pull()
    assert caught.value.exit_code == 8
    server.hold.set()
    server.hold = None
    first.join()
    assert failed == []
    weights.verify(family())


def _failures(call: Any) -> list[StreamT2VError]:
    try:
        call()
    except StreamT2VError as error:
        return [error]
    return []


# ---------------------------------------------------------------------------------------------------- without a network


@pytest.mark.parametrize("how", hub.OFFLINE)
def test_offline_opens_no_connection(
    server: Hub, no_sockets: None, how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(how, "1")
    with pytest.raises(WeightsError, match="no connection is made when offline") as caught:
        pull()
    assert caught.value.exit_code == 4
    with pytest.raises(WeightsError, match="no connection is made when offline"):
        hub.snapshot("somebody/pipeline", None, ["*.json"])
    # All files in a folder of the user: everything works.
    for source in family().sources:
        (tmp_path / source.path).write_bytes(content(source.path))
    pull(folder=tmp_path)
    weights.verify(family())
    assert (tmp_path / VIDXTEND).exists()  # the user's own files stay
    assert server.asked == []


def test_the_guard_of_the_offline_test_sees_connections(server: Hub, no_sockets: None) -> None:
    with pytest.raises(AssertionError, match="a connection was opened"):
        pull()


def test_the_library_s_cache_is_looked_at_before_the_network(
    server: Hub, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    paths = [Path(hf_hub_download(source.repository, source.path)) for source in family().sources_of()]
    server.asked.clear()
    request.getfixturevalue("no_sockets")
    monkeypatch.setenv("STREAMT2V_OFFLINE", "1")
    notes = pull()
    assert sum("already at" in note for note in notes) == len(ORDER)
    assert all(path.exists() for path in paths)  # shared with other programs
    assert home.recorded("sources")[f"ali-vilab/MS-Vid2Vid-XL/{VAE}"]["bytes"] == 60_000
    assert server.asked == []


def test_a_folder_is_used_for_what_it_has(server: Hub, tmp_path: Path) -> None:
    (tmp_path / REFINER).write_bytes(content(REFINER))
    pull(folder=tmp_path)
    assert sorted(name for name, *_ in server.served) == sorted([VIDXTEND, CLIP, VAE])
    # What was recorded once is compared with what lies there the next time.
    family().path("refine.vae").unlink()
    (tmp_path / VAE).write_bytes(content("another"))
    with pytest.raises(WeightsError, match=r"is not the recorded "):
        pull(folder=tmp_path)


def test_converted_files_placed_by_hand_are_checked_and_recorded(server: Hub, no_sockets: None, tmp_path: Path) -> None:
    home.path().mkdir(parents=True, exist_ok=True)
    (tmp_path / "other disk").mkdir()
    (home.path() / family().name).symlink_to(tmp_path / "other disk")  # gigabytes often lie elsewhere
    for file in family().files:
        path = home.path() / file.path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            path.write_text("{}")
        else:
            about = header.metadata_of("AppearanceTokens", {}, None)
            save_file({"weight": torch.zeros(2)}, path, about)
    assert weights.is_absent(family())
    broken = family().path("refine.unet")
    whole = broken.read_bytes()
    broken.write_bytes(whole[:-1])
    with pytest.raises(WeightsError, match="truncated"):
        pull()
    broken.write_bytes(whole)
    notes = pull()
    assert any("found here, recorded" in note for note in notes)
    weights.verify(family())


# --------------------------------------------------------------------------------------------------------- the record


def test_a_damaged_record_is_named(server: Hub) -> None:
    pull()
    record = home.path() / "weights.lock.json"
    for text in ("{", "[]", '{"schema": 2}', '{"schema": 1, "files": {"streamingt2v/stream/cam.safetensors": {}}}'):
        record.write_text(text)
        with pytest.raises(WeightsError):
            family()
    rows = {"streamingt2v/stream/cam.safetensors": {"parts": {"../x": {"bytes": 1, "sha256": "", "stamp": [1, 1]}}}}
    record.write_text(json.dumps({"schema": 1, "files": rows}))
    with pytest.raises(WeightsError, match="outside"):
        family()


def test_gigabytes_are_not_hashed_twice(server: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    pull()
    hashed: list[Path] = []
    real = home.sha256_of
    monkeypatch.setattr(home, "sha256_of", lambda path: [hashed.append(path), real(path)][1])
    [part] = next(file for file in family().files if file.path.endswith("cam.safetensors")).parts.values()
    path = family().path("stream.cam")
    assert part.matches(path)
    assert hashed == []
    path.touch()
    assert part.matches(path)
    assert hashed == [path]
    weights.verify(family())  # always hashes, and remembers what it saw
    assert len(hashed) > 10
    hashed.clear()
    assert all(row.matches(home.path() / name) for file in family().files for name, row in file.parts.items())
    assert hashed == []


def test_the_home_is_set_by_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("STREAMT2V_HOME", "relative")
    assert home.path() == Path.cwd() / "relative"
    monkeypatch.delenv("STREAMT2V_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert home.path() == tmp_path / "streamt2v"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert home.path() == Path.home() / ".cache" / "streamt2v"


# -------------------------------------------------------------------------------------------------------- snapshots


@pytest.fixture
def pipeline(server: Hub) -> Hub:
    server.repositories["somebody/pipeline"] = {
        "model_index.json": b"{}",
        "unet/model.safetensors": content("unet"),
        "unet/model.bin": b"a pickle",
    }
    return server


PATTERNS = ["*.json", "*/*.safetensors"]


def test_a_snapshot_is_fetched_once_by_patterns(pipeline: Hub, request: pytest.FixtureRequest) -> None:
    pipeline.cuts = [10_000, 20_000, 0, 5]
    notes: Notes = []
    folder = hub.snapshot("somebody/pipeline", None, PATTERNS, note=notes.append)
    assert notes == ["somebody/pipeline: 0.1 MB to fetch, minus what is already in the cache"]
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == ["model_index.json", "unet/model.safetensors"]
    assert (folder / found[1]).read_bytes() == content("unet")
    # Ever after: the recorded commit, no connection, and no file that has changed.
    pipeline.commit = "f" * 40
    request.getfixturevalue("no_sockets")
    assert hub.snapshot("somebody/pipeline", None, PATTERNS) == folder
    target = (folder / found[1]).resolve()
    target.write_bytes(content("other"))
    with pytest.raises(WeightsError, match="not as recorded"):
        hub.snapshot("somebody/pipeline", None, PATTERNS)


def test_a_snapshot_that_lost_a_file_is_completed_from_the_recorded_commit(pipeline: Hub) -> None:
    folder = hub.snapshot("somebody/pipeline", None, PATTERNS)
    lost = folder / "unet" / "model.safetensors"
    lost.resolve().unlink()
    lost.unlink()
    assert hub.snapshot("somebody/pipeline", None, PATTERNS) == folder
    assert lost.read_bytes() == content("unet")
    assert not any("revision/main" in request for request in pipeline.asked[len(pipeline.asked) // 2 :])


def test_a_snapshot_in_another_cache_is_the_same_one(
    pipeline: Hub, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache that was emptied or moved: what is fetched again is compared, recorded where it lies, and hashed once."""
    from huggingface_hub import constants

    first = hub.snapshot("somebody/pipeline", None, PATTERNS)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    shutil.rmtree(tmp_path / "cache")
    second = hub.snapshot("somebody/pipeline", None, PATTERNS)
    assert second != first
    request.getfixturevalue("no_sockets")
    monkeypatch.setattr(home, "sha256_of", lambda path: pytest.fail("hashed again"))
    assert hub.snapshot("somebody/pipeline", None, PATTERNS) == second


def test_a_snapshot_that_was_replaced_under_its_commit_is_refused(pipeline: Hub, tmp_path: Path) -> None:
    hub.snapshot("somebody/pipeline", None, PATTERNS)
    shutil.rmtree(tmp_path / "cache")
    pipeline.repositories["somebody/pipeline"]["unet/model.safetensors"] = content("other")
    with pytest.raises(WeightsError, match=r"model\.safetensors is not as recorded"):
        hub.snapshot("somebody/pipeline", None, PATTERNS)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"refusal": (404, "RepoNotFound")}, "no repository"),
        ({"cuts": [0] * 1000}, "cannot be fetched|hub cannot be reached"),
        ({"repositories": {"somebody/pipeline": {"weights.bin": b"a pickle"}}}, "has no files matching"),
    ],
)
def test_a_snapshot_that_cannot_be_had(pipeline: Hub, change: dict[str, Any], said: str) -> None:
    for name, value in change.items():
        setattr(pipeline, name, value)
    with pytest.raises(WeightsError, match=said):
        hub.snapshot("somebody/pipeline", None, PATTERNS)
    assert home.recorded("snapshots") == {}


def test_a_snapshot_in_the_cache_serves_offline(pipeline: Hub, request: pytest.FixtureRequest) -> None:
    from huggingface_hub import snapshot_download

    folder = snapshot_download("somebody/pipeline", allow_patterns=PATTERNS)
    request.getfixturevalue("no_sockets")
    assert hub.snapshot("somebody/pipeline", None, PATTERNS) == Path(folder)


# ------------------------------------------------------------------------------------ the real layouts, in tiny form


def test_every_published_file_in_tiny_form_pulls_converts_and_loads(server: Hub, tmp_path: Path) -> None:
    layouts = published.tiny_layouts()
    shapes = published.published_shapes(layouts)
    names = {
        VIDXTEND: published.VIDXTEND, CLIP: published.CLIP, REFINER: published.REFINER, VAE: published.VAE
    }  # fmt: skip
    for source in family().sources_of():
        state = published.random_state(shapes[names[source.path]])
        path = tmp_path / source.path
        if path.suffix == ".safetensors":
            save_file({key: value.half() for key, value in state.items()}, path)
        else:
            torch.save({"state_dict": state}, path)
        server.repositories[source.repository][source.path] = path.read_bytes()
    server.cuts = [100_000, 5, None, 300_000]
    hub.pull(family(), partial(converter.convert, layouts=layouts), lambda text: None)
    chosen = family()
    weights.verify(chosen)
    for role in chosen.components:
        loaded = weights.load(chosen, role, "cpu", torch.float32)
        if role.endswith("tokenizer"):
            assert loaded.backend.get_vocab_size() == 49408
            assert loaded(["a cat"]).input_ids[0][:2] == [49406, 320]
            assert loaded.pad_id == 0
        else:
            assert not any(parameter.is_meta for parameter in loaded.parameters())
