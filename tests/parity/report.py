"""Collects the error of every recorded quantity and says per file which was worst."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

COMPONENT = 1e-4
"""Relative L2 allowed for one evaluation of a network: float32 on other library versions reached 4e-6."""
WHOLE_RUN = 1e-3
"""... for whole sampling runs, where rounding accumulates over steps and chunks: 6e-5 was reached."""
TABLE = 1e-6
"""... for schedules, computed without networks."""
EXACT = 0.0
"""... for integers."""


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """Return |found - expected| / |expected| in float64; infinite where shapes or the places of infinities differ."""
    if found.shape != expected.shape:
        return math.inf
    found, expected = found.detach().double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(found[~finite], expected[~finite]):
        return math.inf
    error, scale = (found - expected)[finite].norm(), expected[finite].norm()
    return float(error / scale) if scale > 0 else float(error)


@dataclass
class Report:
    """The errors of one golden folder."""

    errors: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def compare(self, file: str, quantity: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Note the error of one quantity; NaN and another shape count as infinite."""
        error = relative_l2(found, expected)
        self.errors.setdefault(file, {})[quantity] = (math.inf if math.isnan(error) else error, tolerance)

    def largest(self, file: str, quantity: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
        """Note the largest difference of any element; NaN and another shape count as infinite."""
        error = math.inf
        if found.shape == expected.shape:
            error = float((found.double() - expected.double()).abs().max())
        self.errors.setdefault(file, {})[quantity] = (math.inf if math.isnan(error) else error, tolerance)

    def same(self, file: str, quantity: str, found: object, expected: object) -> None:
        """Note whether two plain values are equal."""
        self.errors.setdefault(file, {})[quantity] = (0.0 if found == expected else math.inf, EXACT)

    def attempt(self, file: str, check: Callable[[], None]) -> None:
        """Run the check of one file; whatever stops it is a problem of that file, and the others are still checked."""
        try:
            check()
        except Exception as error:
            self.problem(file, f"{type(error).__name__}: {error}")

    def problem(self, file: str, what: str) -> None:
        """Note that a file, or part of it, could not be checked."""
        self.problems.append(f"{file}: {what}")

    def note(self, file: str, what: str) -> None:
        """Note something that is no failure."""
        self.notes.append(f"{file}: {what}")

    @property
    def failures(self) -> list[str]:
        """Quantities outside their tolerance."""
        return [
            f"{file}: {quantity} is off by {error:.3g} (allowed {tolerance:g})"
            for file, quantities in self.errors.items()
            for quantity, (error, tolerance) in quantities.items()
            if not error <= tolerance
        ]

    @property
    def passed(self) -> bool:
        """Whether everything was checked and within tolerance."""
        return bool(self.errors) and not self.failures and not self.problems

    def lines(self) -> list[str]:
        """Return one line per file, then notes, failures and problems, and the summary last."""
        lines = []
        for file, quantities in self.errors.items():
            quantity, (error, tolerance) = max(quantities.items(), key=lambda item: _badness(*item[1]))
            lines.append(f"{file:28} {len(quantities):4} quantities, worst {error:9.3g} of {tolerance:g}: {quantity}")
        lines += [f"note     {text}" for text in self.notes]
        lines += [f"FAILED   {text}" for text in self.failures]
        lines += [f"PROBLEM  {text}" for text in self.problems]
        total = sum(len(quantities) for quantities in self.errors.values())
        verdict = "passed" if self.passed else "FAILED"
        return [
            *lines,
            f"{verdict}: {total} quantities in {len(self.errors)} files, {len(self.failures)} outside their tolerance, "
            f"{len(self.problems)} not checked",
        ]


def _badness(error: float, tolerance: float) -> tuple[bool, float]:
    return error > tolerance, error
