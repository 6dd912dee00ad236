"""How long until the first picture? Runs `generate` as on a fresh machine, and looks at what can be watched.

    python benchmarks/first_picture.py                         # on idle cores; 10 s of the demo
    python benchmarks/first_picture.py --no-refine             # and options of `generate`

Counts seconds and seconds of processor time, of all its threads, from the start of the command until `watch` can show
base frames, and until the growing file can be played. The run is ended then. The bar is 10 s. Writes
`DATE-first-picture.json`.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from streamt2v.jobs import run_directory
from streamt2v.media import fragments
from streamt2v.watching import seen

BAR, EVERY = 10.0, 0.05
RESULTS = Path(__file__).parent / "results"


def spent(process: int) -> float:
    """Seconds of processor time of a process so far. Linux alone tells."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def follow(arguments: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Run `generate` until its growing file plays; return (seconds, processor seconds) by what could be watched."""
    found, began = dict[str, tuple[float, float]](), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.mp4"
        growing = run_directory.directory_for(output) / run_directory.GROWING
        process = subprocess.Popen(
            [sys.executable, "-m", "streamt2v", "generate", *arguments, "-q", "-o", str(output)],
            env=os.environ | {"STREAMT2V_HOME": f"{folder}/home"},
        )
        try:
            while "file" not in found:
                if process.poll() is not None:
                    raise SystemExit("the run ended before it showed anything")
                now = (round(time.monotonic() - began, 2), round(spent(process.pid), 2))
                if "watch" not in found and seen.see(output).last not in ("", "0 0"):
                    found["watch"] = now
                if growing.is_file() and fragments.measure(growing).frames:
                    found["file"] = now
                time.sleep(EVERY)
        finally:
            process.kill()
            process.wait()
    return found


def main() -> None:
    """Run once and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked, more = parser.parse_known_args()
    found = follow(["a red ball floating over the sea at sunset", "--duration", "10s", "--seed", "1", *more])
    record = {
        "date": f"{datetime.date.today()}", "machine": platform.machine(), "cores": os.cpu_count(),
        "load": os.getloadavg()[0], "options": more,
        **{name: {"seconds": seconds, "processor_seconds": busy} for name, (seconds, busy) in found.items()},
    }  # fmt: skip
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / f"{record['date']}-first-picture.json"
    path.write_text(json.dumps(record, indent=1), "utf-8")
    print(path, *(f"{name}: {seconds:.1f} s, {busy:.1f} s of the processor" for name, (seconds, busy) in found.items()))
    raise SystemExit(found["watch"][0] > BAR)


if __name__ == "__main__":
    main()
