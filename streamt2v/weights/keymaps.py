"""Key maps: tables that rename the tensors of a published checkpoint to our names.

Every key is mapped exactly once, or ignored for a stated reason. An unknown key, a missing key or a tensor of another
shape is an error that names it: nothing is loaded partially.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from streamt2v.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor

    State = Mapping[str, Tensor]
    Shapes = Mapping[str, Sequence[int]]
    Reshape = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """One rule of a key map: keys that match `pattern` become `targets` (regex templates), or nothing.

    `reshape` returns one tensor per target. A rule without targets gives the reason why its keys are not needed.
    """

    pattern: str
    targets: tuple[str, ...] = ()
    reshape: Reshape | None = None
    reason: str = ""


def rename(pattern: str, target: str, reshape: Reshape | None = None) -> Rule:
    """Map one key to one."""
    return Rule(pattern, (target,), reshape)


def ignore(pattern: str, reason: str) -> Rule:
    """Drop keys."""
    return Rule(pattern, reason=reason)


@dataclass(frozen=True)
class KeyMap:
    """How to take a network from a checkpoint: keys that begin with `prefix`, by the first rule matching the rest."""

    prefix: str
    rules: tuple[Rule, ...]
    what: str = field(default="the checkpoint", compare=False)

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern[str], Rule]]:
        return [(re.compile(rule.pattern), rule) for rule in self.rules]

    def rename(self, key: str) -> tuple[tuple[str, ...], Reshape | None] | None:
        """Return the new names of a key and its reshape; no names if it is ignored, None if it is unknown."""
        if not key.startswith(self.prefix):
            return None
        for regex, rule in self._compiled:
            if match := regex.fullmatch(key, len(self.prefix)):
                return tuple(map(match.expand, rule.targets)), rule.reshape
        return None

    def apply(self, state: State, expected: Shapes | None = None) -> dict[str, Tensor]:
        """Return the tensors of `state` under their new names.

        Args:
            state: the whole checkpoint, or a part that includes all keys with the prefix.
            expected: keys and shapes of the network to compare with; None skips this.

        Raises:
            WeightsError: a key is unknown, missing, mapped twice, or has another shape.
        """
        result: dict[str, Tensor] = {}
        origins: dict[str, str] = {}
        for key in sorted(key for key in state if key.startswith(self.prefix)):
            renamed = self.rename(key)
            if renamed is None:
                raise WeightsError(f"{self.what} has an unknown key {key!r}", "is it another model's checkpoint?")
            targets, reshape = renamed
            if not targets:
                continue
            try:
                values = [state[key]] if reshape is None else reshape(state[key])
                pairs = list(zip(targets, values, strict=True))
            except (ValueError, IndexError, RuntimeError) as error:
                raise WeightsError(f"{self.what}: {key!r} has shape {tuple(state[key].shape)}: {error}") from error
            for target, value in pairs:
                if target in result:
                    raise WeightsError(f"{self.what} defines {target!r} twice, the second time as {key!r}")
                result[target], origins[target] = value, key
        if not result:
            raise WeightsError(f"{self.what} has no key that begins with {self.prefix!r}")
        if expected is not None:
            self._check(result, expected, origins)
        return result

    def _check(self, result: State, expected: Shapes, origins: Mapping[str, str]) -> None:
        if missing := sorted(set(expected) - set(result)):
            raise WeightsError(f"{self.what} lacks {missing[0]!r} ({len(missing)} keys are missing)")
        if extra := sorted(origins[target] for target in set(result) - set(expected)):
            raise WeightsError(f"{self.what} has {extra[0]!r}, which the network does not ({len(extra)} keys too many)")
        for target, value in result.items():
            if tuple(value.shape) != tuple(expected[target]):
                found, wanted = tuple(value.shape), tuple(expected[target])
                raise WeightsError(f"{self.what}: {origins[target]!r} has shape {found}, the network wants {wanted}")


def check_prefixes(state: Iterable[str], maps: Iterable[KeyMap], ignored: Mapping[str, str]) -> None:
    """Raise WeightsError for the first key that begins with no prefix of a map, and none of the `ignored` ones."""
    known = (*(key_map.prefix for key_map in maps), *ignored)
    for key in state:
        if not key.startswith(known):
            raise WeightsError(f"the checkpoint has an unknown key {key!r}", f"known beginnings: {', '.join(known)}")
