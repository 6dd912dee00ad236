"""The transformer of the demo: patches, places, and that it takes any size, any length and any number of clips."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamt2v.errors import ConfigError
from streamt2v.models.dit import SpacetimeConfig, SpacetimeTransformer, angles, patched, places, turned, unpatched

TINY = SpacetimeConfig(width=24, depth=2, heads=2, text_dim=8)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny(config: SpacetimeConfig = TINY) -> SpacetimeTransformer:
    """With weights everywhere: a fresh one predicts nothing but zeros."""
    torch.manual_seed(0)
    network = SpacetimeTransformer(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval().requires_grad_(False)


def given_to(rows: int, frames: int, height: int = 6, width: int = 4, seed: int = 0) -> dict[str, Tensor]:
    mask = torch.ones(rows, 5)
    mask[:, 3:] = 0
    return {
        "x": normals(rows, 4, frames, height, width, seed=seed),
        "sigmas": normals(rows, frames, seed=seed + 1).sigmoid(),
        "words": normals(rows, 5, 8, seed=seed + 2),
        "mask": mask,
    }


sides, extents = st.integers(1, 4), st.integers(1, 9)


@given(extents, extents, st.integers(1, 3), sides, sides)
def test_patches_join_to_what_they_were_cut_from(height: int, width: int, frames: int, rows: int, columns: int) -> None:
    latents = normals(2, 3, frames, height, width)
    patches = patched(latents, (rows, columns))
    count = -(-height // rows) * -(-width // columns)
    assert patches.shape == (2, frames, count, 3 * rows * columns)
    assert torch.equal(unpatched(patches, (rows, columns), (height, width)), latents)
    filled = -(-height // rows) * rows * -(-width // columns) * columns
    assert int((patches != 0).sum()) == latents.numel() <= 2 * 3 * frames * filled


@given(extents, extents, st.integers(1, 3), sides, sides)
def test_a_place_is_the_middle_of_its_patch(height: int, width: int, frames: int, rows: int, columns: int) -> None:
    ys, xs = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    times = torch.arange(frames).view(-1, 1, 1).expand(frames, height, width)
    cells = torch.stack([times, ys.expand_as(times), xs.expand_as(times)])[None]  # where each cell lies
    cut = patched(cells + 1, (rows, columns))  # one more, so that what fills up can be told
    middles = places(torch.arange(frames), (height, width), (rows, columns)).view(frames, -1, 3)
    for patch, middle in zip(cut.flatten(0, 2), middles.flatten(0, 1), strict=True):
        shown = patch.view(3, -1)[:, patch.view(3, -1)[0] > 0] - 1
        assert shown[0].unique().tolist() == [middle[0]]
        if shown.shape[1] == rows * columns:
            assert torch.allclose(shown[1:].mean(1), middle[1:])
        assert bool(((shown[1:] - middle[1:, None]).abs() < torch.tensor([[rows], [columns]]) / 2).all())


offsets = st.tuples(st.integers(-40, 40), st.integers(-20, 20), st.integers(-20, 20))


@settings(deadline=None)
@given(offsets, st.integers(0, 5))
def test_shifting_all_positions_changes_nothing(offset: tuple[int, int, int], seed: int) -> None:
    network, here = tiny(), places(torch.arange(3), (6, 4), TINY.patch)
    there = here + torch.tensor(offset)
    q, k = normals(2, 2, 12, 12, seed=seed), normals(2, 2, 12, 12, seed=seed + 9)
    seen = [turned(q, angles(at, 12)) @ turned(k, angles(at, 12)).mT for at in (here, there)]
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=1e-4)
    block = network.blocks[0]
    x, condition, words = normals(2, 3, 4, 24, seed=seed), normals(2, 3, 24, seed=seed), normals(2, 5, 8, seed=seed)
    mask = torch.ones(2, 1, 1, 5, dtype=torch.bool)
    made = [block(x, condition, angles(at, 12), words, mask) for at in (here, there)]
    torch.testing.assert_close(made[0], made[1], atol=1e-3, rtol=1e-3)
    # While moving one patch alone changes what all others see.
    moved = here.clone()
    moved[0] += 1.5
    assert not torch.allclose(block(x, condition, angles(moved, 12), words, mask)[:, 1:], made[0][:, 1:], atol=1e-3)


@pytest.mark.parametrize("frames", [1, 2, 17])
@pytest.mark.parametrize("size", [(9, 16), (16, 9), (12, 12), (1, 1), (7, 5)])
def test_any_size_and_length_fits(frames: int, size: tuple[int, int]) -> None:
    made = tiny()(**given_to(2, frames, *size), anchor=normals(2, 4, 1, *size))
    assert made.shape == (2, 4, frames, *size)
    assert made.isfinite().all()


def test_a_batch_is_what_its_rows_are_alone() -> None:
    network, rows, anchor = tiny(), given_to(3, 4), normals(3, 4, 1, 6, 4)
    together = network(**rows, anchor=anchor)
    for row in range(3):
        alone = network(**{name: value[row : row + 1] for name, value in rows.items()}, anchor=anchor[row : row + 1])
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_everything_that_it_is_told_counts() -> None:
    network, rows = tiny(), given_to(1, 4)
    plain = network(**rows)
    for name, value in rows.items():
        other = 1 - value if name == "mask" else value.roll(1, -1)
        assert not torch.allclose(network(**rows | {name: other}), plain, atol=1e-3), name
    anchored = [network(**rows, anchor=normals(1, 4, 1, 6, 4, seed=seed)) for seed in (1, 2)]
    assert not torch.allclose(anchored[0], plain, atol=1e-3)
    assert not torch.allclose(anchored[0], anchored[1], atol=1e-3)


def test_what_fills_the_text_up_is_not_read() -> None:
    rows = given_to(1, 2)
    other = rows["words"].clone()
    other[:, 3:] = 7
    assert torch.equal(tiny()(**rows | {"words": other}), tiny()(**rows))


def test_the_noise_of_one_frame_is_its_own() -> None:
    """Two frames that change places, with their noise levels, are not the same clip; nor is one level for both."""
    network, rows = tiny(), given_to(1, 2)
    swapped = rows | {"sigmas": rows["sigmas"].flip(1)}
    assert not torch.allclose(network(**swapped), network(**rows), atol=1e-3)


def test_a_fresh_network_predicts_nothing_and_the_sizes_of_the_demo_are_what_is_said() -> None:
    with torch.no_grad():
        assert not SpacetimeTransformer(TINY)(**given_to(1, 2)).any()
    with torch.device("meta"):
        demo = SpacetimeTransformer(SpacetimeConfig())
    assert sum(parameter.numel() for parameter in demo.parameters()) == 6_485_400


@pytest.mark.parametrize(("width", "heads"), [(24, 5), (20, 4), (6, 2)])
def test_sizes_without_a_meaning_are_refused(width: int, heads: int) -> None:
    with pytest.raises(ConfigError, match="heads"):
        replace(TINY, width=width, heads=heads)
