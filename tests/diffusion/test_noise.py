"""Addressed draws depend on the address alone."""

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.diffusion.noise import SeededDraws, per_frame

addresses = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.integers(0, 99), st.integers(0, 9)), unique=True, min_size=2
)


@given(st.integers(0, 2**63 - 1), addresses, st.randoms(use_true_random=False))
def test_order_of_calls_does_not_matter(seed: int, asked: list[tuple[str, int, int]], shuffle: random.Random) -> None:
    draws = SeededDraws(seed)
    first = {key: draws.normal(key[0], key[1:], (3,)) for key in asked}
    again = asked.copy()
    shuffle.shuffle(again)
    for key in again:
        assert torch.equal(first[key], draws.normal(key[0], key[1:], (3,)))
    values = [tuple(value.tolist()) for value in first.values()]
    assert len(set(values)) == len(values)


def test_frames_share_noise_between_chunks() -> None:
    draws = SeededDraws(5)
    left = per_frame(draws, "x", range(16), (2, 3), 7)
    right = per_frame(draws, "x", range(8, 24), (2, 3), 7)
    assert torch.equal(left[8:], right[:8])


def test_draws_look_normal_and_integers_cover_their_range() -> None:
    draws = SeededDraws(1)
    values = draws.normal("x", (0,), (20000,))
    assert abs(values.mean()) < 0.03
    assert abs(values.std() - 1) < 0.03
    spread = draws.uniform("x", (0,), (20000,))
    assert 0 <= spread.min() < 0.001 < 0.999 < spread.max() < 1
    assert abs(spread.mean() - 0.5) < 0.01
    assert {draws.integer("cut", (i,), 0, 8) for i in range(200)} == set(range(9))
