"""docs/speed.md from the results of `speed.py`, `peers.py` and `gpu.py`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

LENGTH = 1200  # frames that the totals are extrapolated to
TARGETS = {"reference": 1620, "balanced": 720, "fast": 240}  # seconds for them on one H100, at 1280x720


AGAINST_PUBLISHED = [
    "## Against the published code of StreamingT2V", "",
    "| part, on a CPU in float32 | our seconds / its seconds |", "|---|---|",
    "| stage 2, a chunk of three steps | 0.62 |",
    "| stage 2, a chunk of one step, each as it ships | 0.49 |",
    "| the same, with equal settings of the allocator | 0.58 |",
    "| refiner, a step | 0.74 |", "",
    "Measured once, in November 2026, with the same weights in both; outputs are equal to 1e-5 relative, and the "
    "memory is the same (ratio 1.0). The published code is not part of this repository, so nothing here repeats it. "
    "What could be unfair: it is written for GPUs, not for a CPU; and ours keeps freed memory "
    "(`devices.keep_freed_memory`), which is the difference between the second and the third row. Nothing here says "
    "how the two compare on a GPU.", "",
]  # fmt: skip
"""Figures of a review, which no script here repeats."""


def table(results: Path) -> str:
    """docs/speed.md from every result in a folder."""
    lines = [
        "# Speed",
        "",
        "Made by `python benchmarks/speed.py`, which explains how it measures; one section per machine.",
        "",
    ]
    for path in sorted(results.glob("*-speed-*.json")):
        lines += section(json.loads(path.read_text("utf-8")))
    for path in sorted(results.glob("*-peers-*.json")):
        lines += peer_section(json.loads(path.read_text("utf-8")))
    lines += AGAINST_PUBLISHED
    for path in sorted(results.glob("*-old-against-new-*.json")):
        lines += change_section(json.loads(path.read_text("utf-8")), path.name)
    for path in sorted(results.glob("*-gpu*.jsonl")):
        lines += gpu_section([json.loads(line) for line in path.read_text("utf-8").splitlines()])
    if not list(results.glob("*-gpu*.jsonl")):
        lines += [
            "## On a GPU",
            "",
            "Not run on CUDA yet: `python benchmarks/gpu.py` makes the rows of this table.",
            "",
        ]
    return "\n".join(lines)


def peer_section(result: Mapping[str, Any]) -> list[str]:
    """The lines of a comparison with the library's networks, from what `peers.py` left."""
    sizes = f"{result['frames']} frames of {result['height']}x{result['width']} latents, two rows"
    widths = "/".join(map(str, result["widths"]))
    packages = ", ".join(f"{name} {found}" for name, found in result["versions"].items())
    lines = [
        f"## Against the library's UNets, {result['device']}, {result['date']}", "",
        f"`python benchmarks/peers.py`, which explains how it measures: {sizes}, widths {widths}; {packages}; "
        f"{result['threads']} thread{'s' * (result['threads'] > 1)}. Memory is what a forward adds to the networks.",
        "",
        "| network of diffusers | s | ours, s | ours / theirs | TFLOP | ours | GB | ours | largest difference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["rows"].items():
        theirs, ours = row["theirs"], row["ours"]
        cells = [name, *(f"{side['seconds']:.3g}" for side in (theirs, ours))]
        cells += [f"{ours['seconds'] / theirs['seconds']:.2f}", *(f"{side['tflop']:.3g}" for side in (theirs, ours))]
        cells += [f"{side['peak_bytes'] / 1e9:.2f}" for side in (theirs, ours)]
        cells.append(f"{row['difference']:.0e}" if "difference" in row else "other network")
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def change_section(result: Mapping[str, Any], name: str) -> list[str]:
    """The lines of what a change brought: medians of both sides, measured in turn."""
    lines = [
        f"## Old against new, {name.removesuffix('.json').replace('-old-against-new-', ', ')}",
        "",
        f"{result['machine']}. {result['how'].capitalize()}: `{name}`.",
        "",
    ]
    lines += ["| what | unit | old | new | new / old |", "|---|---|---|---|---|"]
    for what, row in result["rows"].items():
        old, new = median(row["old"]), median(row["new"])
        lines.append(f"| {what} | {row['unit']} | {old:.3g} | {new:.3g} | {new / old:.2f} |")
    return [*lines, ""]


def gpu_section(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of one card, from the rows that `gpu.py` left."""
    machine = next((row for row in rows if row["name"] == "machine"), {"card": "an unknown card", "date": "?"})
    packages = ", ".join(f"{name} {found}" for name, found in machine.get("packages", {}).items())
    lines = [
        f"## {machine['card']}, {machine['date']}", "",
        f"Rows of `python benchmarks/gpu.py{' --small' * bool(machine.get('small'))}`; {packages}.", "",
        "| step | what | way | ms | rate | more |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    known = {"step", "name", "way", "ms", "tflop", "gb"}
    for row in rows:
        if row["name"] == "machine":
            continue
        seconds, rate = row.get("ms", 0) / 1000, ""
        if seconds and row.get("tflop"):
            rate = f"{row['tflop'] / seconds:.3g} TFLOP/s"
        elif seconds and row.get("gb"):
            rate = f"{row['gb'] / seconds:.3g} GB/s"
        more = "; ".join(f"{key} {value}" for key, value in row.items() if key not in known).replace("|", "/")
        shown = [row["step"], row["name"], row.get("way", ""), f"{row['ms']:.4g}" if "ms" in row else "", rate, more]
        lines.append("| " + " | ".join(" ".join(str(cell).split()) for cell in shown) + " |")
    return [*lines, ""]


def section(result: Mapping[str, Any]) -> list[str]:
    """The lines of one machine and family."""
    published, of, ceiling = result["model"] == "streamingt2v", "matmul", "A large matrix product runs"
    if "ceiling_tflops" in result:  # not in those of earlier versions
        of, ceiling = "the fastest", "The fastest large matrix products and convolutions run"
    rate = result["ceiling_tflops" if "ceiling_tflops" in result else "matmul_tflops"]
    lines = [
        f"## {result['model']} on {result['device']}, {result['date']}", "",
        f"{result['dtype']}, torch {result['versions']['torch']}. {ceiling} at {rate:.3g} TFLOP/s. "
        f"Times are {result['clock']}; "
        f"all networks stay loaded. {result.get('note', '')}".strip(), "",
        f"| part | size | seconds | TFLOP | TFLOP/s | share of {of} | peak GB |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, row in result["parts"].items():
        speed, steps = row["tflop"] / row["seconds"], f" ({row['steps']} steps)" if "steps" in row else ""
        numbers = f"{row['seconds']:.3g} | {row['tflop']:.3g} | {speed:.3g} | {speed / rate:.0%}"
        lines.append(f"| {name}{steps} | {row['width']}x{row['height']} | {numbers} | {row['peak_bytes'] / 1e9:.1f} |")
    lines += ["", f"{LENGTH} frames after the first chunk, **extrapolated** from these parts, in seconds:", ""]
    lines += ["| quality | stage 2 | refiner | its VAE | together |" + (" target (H100) |" if published else "")]
    lines += ["|---|---|---|---|---|" + ("---|" if published else "")]
    for quality, row in result["totals"].items():
        target = f" {TARGETS[quality]} |" if published else ""
        lines.append(f"| {quality} | " + " | ".join(f"{value:.0f}" for value in row.values()) + f" |{target}")
    if profile := result.get("profile", {}):
        kinds = [kind for kind in next(iter(profile.values())) if kind != "whole"]
        lines += ["", "What remains, by torch's profiler; its own time counts as idle:", ""]
        lines += [f"| share of the time | {' | '.join(kinds)} | idle |", "|---" * (len(kinds) + 2) + "|"]
    for name, row in profile.items():
        shares = [row[kind] / row["whole"] for kind in kinds]
        lines.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in [*shares, max(0, 1 - sum(shares))])} |")
    lines += [
        "",
        "| exact gain | without, s | with, s | with / without | largest difference |",
        "|---|---|---|---|---|",
    ]
    for name, row in result["gains"].items():
        change = "other size" if row["difference"] is None else f"{row['difference']:.0e}"
        lines.append(
            f"| {name} | {row['without']:.3g} | {row['with']:.3g} | {row['with'] / row['without']:.2f} | {change} |"
        )
    if near := result.get("near_gains", {}):
        lines += ["", "What approximate gains change: [concepts.md](concepts.md).", ""]
        lines += ["| approximate gain | without, s | with, s | with / without |", "|---|---|---|---|"]
    for name, row in near.items():
        lines.append(f"| {name} | {row['without']:.3g} | {row['with']:.3g} | {row['with'] / row['without']:.2f} |")
    gaps = ", ".join(f"{gap:.0e} in {name}" for name, gap in result["rounding"].items())
    lines += ["", f"For comparison, the largest difference between 16 and 32 bit of the same way: {gaps}."]
    if result["tiers"]:
        lines += ["", "| memory | what is done | stated peak, GB | measured peak, GB |", "|---|---|---|---|"]
    for row in result["tiers"]:
        peak = "does not fit" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.1f}"
        peak += "".join(f"; {text}" for text in row["warnings"])
        lines.append(f"| {row['gigabytes']:g} GB | {row['policy']} | {row['stated_bytes'] / 1e9:.1f} | {peak} |")
    if run := result["run"]:
        what = f"{run['frames']} frames at `fast`, {run['width']}x{run['height']}{', compiled' * run['compiled']}"
        lines += ["", f"{what}, **really made**, with first chunk, loading and encoding: {run['seconds']:.0f} s."]
    return [*lines, ""]
