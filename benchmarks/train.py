"""Train what only the benchmarks use, as `streamt2v train` does: the judge, and the denoiser that ablation.py compares.

python benchmarks/train.py judge --minutes 25 --out DIR
python benchmarks/train.py concatenated --steps 400 --out DIR
"""

import argparse
from pathlib import Path

from concatenation import concatenated_job
from judge import judge_job

from streamt2v.training import loop

JOBS = {"judge": judge_job, "concatenated": concatenated_job}


def main() -> None:
    """Train one part, or go on with it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=JOBS)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steady", action="store_true", help="keep the learning rate: this run will be continued")
    asked = vars(parser.parse_args())
    print(loop.train(asked.pop("part"), **asked, jobs=JOBS, log=print))


if __name__ == "__main__":
    main()
