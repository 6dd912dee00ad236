"""`python -m tests.parity FOLDER ...`: check golden folders, print the worst error per file, exit 1 on any failure."""

import sys
from pathlib import Path

from tests.parity import stage2, stage3, streamingsvd
from tests.parity.report import Report

CHECKS = (streamingsvd, stage2, stage3)


def check(folder: Path) -> Report:
    """Check a golden folder of whatever kind it is."""
    for kind in CHECKS:
        if kind.recognises(folder):
            return kind.check(folder)
    report = Report()
    report.problem(str(folder), "no golden folder of a known kind")
    return report


def main(arguments: list[str]) -> int:
    """Check every folder named on the command line."""
    if not arguments:
        print("usage: python -m tests.parity FOLDER ...", file=sys.stderr)
        return 2
    reports = []
    for folder in map(Path, arguments):
        if len(arguments) > 1:
            print(f"== {folder}")
        reports.append(check(folder))
        print("\n".join(reports[-1].lines()))
    return 0 if all(report.passed for report in reports) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
