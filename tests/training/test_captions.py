"""The caption grammar, its inverse and the tokenizer."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.training.world.captions import (
    EXAMPLES,
    MAX_TOKENS,
    UNSPECIFIED,
    build_tokenizer,
    canonical,
    compose,
    parse,
    tokenise,
    vocabulary,
)
from streamt2v.training.world.scenes import ATTRIBUTES

LABELS = st.tuples(*(st.integers(0, len(words) - 1) for words in ATTRIBUTES.values())).map(list)


@given(LABELS)
def test_canonical_captions_say_everything(labels: list[int]) -> None:
    assert parse(canonical(labels)) == labels


@given(LABELS, st.integers(0, 10_000))
def test_any_wording_says_nothing_else(labels: list[int], seed: int) -> None:
    found = parse(compose(labels, torch.Generator().manual_seed(seed)))
    assert all(f in (label, UNSPECIFIED) for f, label in zip(found, labels, strict=True))
    assert found[1] == labels[1]
    assert found[4:] == labels[4:]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A red ball bouncing over the sea at sunset.", [0, 0, 2, 0, 1, 0]),
        ("a red ball, floating, sea, sunset", [0, 0, 2, 0, 1, 0]),
        ("golden sphere moving to the left above the ocean", [3, 0, 0, 0, 0, 0]),
        ("at night, a violet lamp rises over the foggy town", [4, 2, 3, 3, 2, 2]),
        ("a white star circling over the hills at dawn in snow", [5, 1, 4, 1, 1, 3]),
        ("a crescent under a cloudy sky", [-1, 3, -1, -1, 0, 1]),
        ("", [-1, -1, -1, -1, 0, 0]),
    ],
)
def test_prompts_as_people_write_them(prompt: str, expected: list[int]) -> None:
    assert parse(prompt) == expected


def test_the_tokenizer_knows_every_word_of_the_grammar() -> None:
    tokenizer = build_tokenizer()
    words = [*vocabulary()["canonical"], *vocabulary()["ignored"]]
    assert tokenizer.unk_token_id not in tokenizer(" ".join(words))["input_ids"]


def test_any_text_becomes_tokens_of_one_length() -> None:
    tokenizer = build_tokenizer()
    ids = tokenise(tokenizer, ["", "Zürich \U0001f388 \x00 quark", "red " * 100])
    assert ids.shape == (3, MAX_TOKENS)
    assert (ids == tokenizer.eos_token_id).any(dim=1).all()
    assert tokenizer.eos_token_id != 2  # transformers would read the pooled vector elsewhere


def test_the_examples_lie_inside_the_world() -> None:
    assert all(UNSPECIFIED not in parse(example) for example in EXAMPLES)
