"""Key maps are strict about what they do not know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from streamt2v.errors import WeightsError
from streamt2v.weights.keymaps import KeyMap, rename
from streamt2v.weights.published import STREAM

State = dict[str, Tensor]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.update({"resampler.extra": torch.empty(1)}), "unknown key 'resampler.extra'"),
        (lambda state: state.pop("resampler.context_embedding.2.bias"), "lacks 'linear_2.bias'"),
        (lambda state: state.update({"resampler.context_embedding.0.bias": torch.empty(9)}), r"shape \(9,\)"),
        (lambda state: state.clear(), "no key that begins with 'resampler.'"),
    ],
)
def test_whatever_is_wrong_is_named(change: Callable[[State], Any], said: str) -> None:
    layers = (("0", 4, 3), ("2", 6, 4))
    state = {f"resampler.context_embedding.{i}.weight": torch.empty(out, into) for i, out, into in layers}
    state |= {f"resampler.context_embedding.{i}.bias": torch.empty(out) for i, out, _ in layers}
    expected = {"linear_1.weight": (4, 3), "linear_1.bias": (4,), "linear_2.weight": (6, 4), "linear_2.bias": (6,)}
    STREAM["apm"].apply(state, expected)
    change(state)
    with pytest.raises(WeightsError, match=said):
        STREAM["apm"].apply(state, expected)


def test_a_key_too_many_and_a_key_mapped_twice_are_named() -> None:
    with pytest.raises(WeightsError, match=r"conv_in\.weight"):
        STREAM["cam"].apply({"unet.conv_in.weight": torch.empty(1)}, {})
    twice = KeyMap("", (rename("a|b", "c"),))
    with pytest.raises(WeightsError, match="twice"):
        twice.apply({"a": torch.empty(1), "b": torch.empty(1)})
