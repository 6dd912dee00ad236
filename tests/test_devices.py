"""Devices: names, number formats, threads and memory."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from streamt2v import devices
from streamt2v.errors import ConfigError
from tests.pretended import pretended


def test_the_cpu_computes_in_full_precision() -> None:
    device = devices.resolve("cpu")
    assert (device.name, device.kind) == ("cpu", "cpu")
    assert "cores" in devices.describe(device)


def test_auto_finds_something() -> None:
    assert devices.resolve().kind in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "mps:0", "CPU"])
def test_names_that_mean_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a device"):
        devices.resolve(name)


def test_an_absent_device_says_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch finds 0 CUDA devices") as caught:
        devices.resolve("cuda")
    assert "--device cpu" in caught.value.hint
    with pytest.raises(ConfigError, match="no mps"):
        devices.resolve("mps")
    assert devices.resolve("auto").name == "cpu"


def test_one_of_several_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert devices.resolve("auto") == devices.Device("cuda:0")
    assert devices.resolve("cuda").name == "cuda:0"
    assert devices.resolve("cuda:1") == devices.Device("cuda:1")
    assert current == [0, 0, 1]  # what says no index means this one
    with pytest.raises(ConfigError, match="there is no 'cuda:2': torch finds 2 CUDA devices"):
        devices.resolve("cuda:2")


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        assert devices.set_threads(2) == torch.get_num_threads() == 2
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert devices.set_threads() == torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "many")
        assert devices.set_threads() == devices.usable_cpus()
        with pytest.raises(ConfigError, match="0 threads"):
            devices.set_threads(0)
    finally:
        torch.set_num_threads(before)


def test_a_container_limits_cores_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = {"cpu.max": "100000 100000", "memory.max": str(3 * 2**20), "memory.current": str(2**20)}
    monkeypatch.setattr(devices, "_first_line", lambda path: lines[path.rpartition("/")[2]])
    monkeypatch.setattr(devices, "_field", lambda path, name: 2**18 if "cgroup" in path else 2**30)
    assert devices.usable_cpus() == 1
    assert devices.free_memory() == 2 * 2**20 + 2**18
    lines.update({"cpu.max": "max 100000", "memory.max": "max"})
    assert devices.usable_cpus() == len(os.sched_getaffinity(0))
    assert devices.free_memory() == 2**40


def test_memory_is_plausible() -> None:
    held = torch.ones(2**22)  # 16 MiB
    peak = devices.peak_memory()
    assert 2**24 < peak < 2**40
    assert devices.peak_memory() >= peak
    assert 2**24 < devices.free_memory() < 2**50
    assert held.sum() == 2**22


@pytest.mark.skipif(sys.platform != "linux", reason="an option of glibc")
def test_freed_memory_can_be_kept() -> None:
    assert devices.keep_freed_memory() in (True, False)  # False on systems with another C library


@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = devices.resolve("cuda")
    held = torch.ones(2**22, device=device.name)
    assert devices.peak_memory(device) >= held.numel() * 4
    assert devices.free_memory(device) > 0
    assert "GiB" in devices.describe(device)


@pytest.mark.gpu
def test_a_gpu_is_sent_to_and_timed_without_waiting() -> None:
    device = devices.resolve("cuda")
    watch, values = devices.Stopwatch(device), torch.arange(4096.0)
    with devices_wait_for_nothing(), watch.running():
        sent = devices.send(values, device.name)
        back = (2 * sent).to("cpu", non_blocking=True).to(device.name, non_blocking=True)
    assert watch.seconds > 0
    assert torch.equal(back.cpu(), 2 * values)


@contextlib.contextmanager
def devices_wait_for_nothing() -> Iterator[None]:
    """Let torch refuse whatever makes the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_channels_come_last_on_a_cpu_and_change_nothing() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8), torch.nn.Unflatten(1, (8, 1)), torch.nn.Conv3d(8, 4, 1)
    )
    images = torch.randn(2, 3, 9, 7)
    plain = network(images)
    devices.arrange(network, devices.Device("cuda:0"))
    assert network[0].weight.is_contiguous()
    devices.arrange(network, devices.Device("cpu"))
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[3].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert network[0](images).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network(images), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("vendor", "amx", "avx512", "narrow"),
    [
        ("AuthenticAMD", False, True, True),
        ("AuthenticAMD", False, False, False),
        ("GenuineIntel", True, True, True),
        ("GenuineIntel", False, True, False),  # 1.85 times as slow there, as was measured
        ("", False, True, True),
    ],
)
def test_bfloat16_is_for_processors_that_are_faster_with_it(
    vendor: str, amx: bool, avx512: bool, narrow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.delenv("PROCESSOR_IDENTIFIER", raising=False)
    monkeypatch.setattr(devices, "_text", lambda path: f"processor\t: 0\nvendor_id\t: {vendor}\n")
    assert devices.has_bfloat16(devices.Device("cpu")) == narrow
    monkeypatch.setattr(devices, "_text", lambda path: "")
    monkeypatch.setenv("PROCESSOR_IDENTIFIER", f"Family 6 Model 143, {vendor}")
    assert devices.has_bfloat16(devices.Device("cpu")) == narrow
    assert devices.has_bfloat16(devices.Device("cuda:0")) and not devices.has_bfloat16(devices.Device("mps"))


def test_a_card_has_a_name_and_other_devices_have_none() -> None:
    with pretended("A", "B"):
        assert devices.card(devices.resolve("cuda:1")) == "B"
        assert "B (cuda:1), 75 GiB" in devices.describe(devices.Device("cuda:1"))
    assert devices.card(devices.Device("cpu")) == ""


def test_what_was_never_tried_is_said() -> None:
    assert "never tested on MPS" in devices.caution("mps")
    assert devices.caution("cuda") == devices.caution("cpu") == ""


def test_work_is_timed_on_a_gpu_without_waiting() -> None:
    began = time.perf_counter()
    with pretended() as waits:
        watch = devices.Stopwatch(devices.Device("cuda:0"))
        for _ in range(3):
            with watch.running():
                time.sleep(0.01)
        assert not waits
        assert 0.03 <= watch.seconds <= time.perf_counter() - began
        assert waits.total() == 1
    began, watch = time.perf_counter(), devices.Stopwatch(devices.Device("cpu"))
    with watch.running():
        time.sleep(0.01)
    assert 0.01 <= watch.seconds <= time.perf_counter() - began


def test_memory_is_given_back_without_loading_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    reset: list[None] = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(None))
    with pretended():
        monkeypatch.delitem(sys.modules, "torch._inductor.cudagraph_trees", raising=False)
        devices.release_memory(devices.Device("cuda:0"), graphs=True)
        assert not reset
        monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", sys)
        devices.release_memory(devices.Device("cuda:0"))
        assert not reset  # the next job of a batch finds what was compiled
        devices.release_memory(devices.Device("cuda:0"), graphs=True)
        assert reset


def test_a_limit_of_the_shell_counts_as_memory_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "address_limit", lambda: 10**6)
    assert devices.free_memory() == 0
    failed = RuntimeError("could not create a primitive")  # all that oneDNN says
    assert devices.is_out_of_memory(failed)
    monkeypatch.setattr(devices, "address_limit", lambda: None)
    assert not devices.is_out_of_memory(failed)


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
def test_under_a_limit_of_the_shell_a_run_ends_with_clear_words(tmp_path: Path) -> None:
    """Before torch is imported, which would crash."""
    command = [sys.executable, "-m", "streamt2v", "generate", "a ball", "-o", str(tmp_path / "a.mp4")]
    limited = ["bash", "-c", 'ulimit -v 500000; exec "$@"', "bash", *command]
    ended = subprocess.run(limited, capture_output=True, text=True)
    assert ended.returncode == 6, ended.stderr
    assert "(ulimit -v)" in ended.stderr
    assert "Traceback" not in ended.stderr
