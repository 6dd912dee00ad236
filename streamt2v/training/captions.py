"""Captions of the procedural world: a small grammar, its inverse, and the word-level tokenizer."""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from streamt2v.training.world import ATTRIBUTES

MAX_TOKENS = 24
UNSPECIFIED = -1

# Every word that names an attribute value; the first is the canonical one.
WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "colour": (
        ("red", "crimson"), ("green", "emerald"), ("blue", "azure"), ("yellow", "golden"), ("purple", "violet"),
        ("white",),
    ),
    "subject": (("ball", "sphere"), ("star",), ("cube", "box", "block"), ("fish",)),
    "motion": (
        ("left", "leftwards", "leftward"),
        ("right", "rightwards", "rightward"),
        ("bouncing", "bounces", "jumping", "jumps"),
        ("rising", "rises", "up", "upwards", "ascending"),
        ("circling", "circles", "circle", "orbiting"),
    ),
    "place": (
        ("sea", "ocean", "water", "waves"),
        ("meadow", "grass", "field", "meadows"),
        ("desert", "sand", "dunes"),
        ("city", "town", "buildings", "skyline"),
    ),
    "time": (
        ("day", "daytime", "daylight", "noon", "sunny"),
        ("sunset", "dusk", "evening"),
        ("night", "midnight", "moonlight"),
    ),
}  # fmt: skip
_CARRIERS = ("drifting", "moving", "floating", "flying", "drifts", "moves")
IGNORED = (
    "a", "an", "the", "and", "is", "in", "at", "by", "on", "of", "to", "over", "above", "under", "during", "with",
    "bright", "scene", "video", "clip", "large", "big", "around", "one", "it", "that", "which", *_CARRIERS,
)  # fmt: skip
EXAMPLES = (
    "a red ball bouncing over the sea at sunset",
    "a yellow star drifting right over the desert by day",
    "a green fish drifting left over the sea by day",
    "a white cube rising over the city at night",
    "a purple ball circling over the meadow at sunset",
)
_LOOKUP = {
    word: (name, index) for name, groups in WORDS.items() for index, group in enumerate(groups) for word in group
}


def _pick(options: tuple[str, ...], generator: torch.Generator) -> str:
    """The first option half of the time, any of them otherwise."""
    if torch.rand((), generator=generator) < 0.5:
        return options[0]
    return options[int(torch.randint(len(options), (), generator=generator))]


def canonical(labels: list[int], colour: bool = True) -> str:
    """The plain caption of attribute indices in the order of `ATTRIBUTES`, with or without the colour."""
    shade, subject, motion, place, time = (ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, labels, strict=True))
    when = "by day" if time == "day" else f"at {time}"
    return f"a {shade + ' ' if colour else ''}{subject} {motion} over the {place} {when}"


def compose(labels: list[int], generator: torch.Generator) -> str:
    """A random wording of attribute indices: synonyms, other orders, sometimes a part left out (no time means day).

    A colour left out is a hole that CAM or APM must fill from the pictures they see: captions that always name it
    leave nothing to the anchor frame.
    """

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    if chance(0.35):
        return canonical(labels, colour=not chance(0.25))
    colour, subject, motion, place, time = (
        _pick(WORDS[name][i], generator) for name, i in zip(ATTRIBUTES, labels, strict=True)
    )
    if labels[2] < 2:
        motion = (
            f"{_pick(_CARRIERS, generator)} {'to the ' if chance(0.2) and motion in ('left', 'right') else ''}{motion}"
        )
    elif motion in ("up", "upwards"):
        motion = f"{_pick(_CARRIERS, generator)} {motion}"
    elif motion == "circle":
        motion = "moving in a circle"
    where = f"{_pick(('over', 'above', 'in', 'at'), generator)} the {place}"
    when = "" if labels[4] == 0 and chance(0.5) else f"{_pick(('at', 'by', 'during'), generator)} {time}"
    motion = "" if chance(0.08) else motion
    where = "" if chance(0.08) else where
    subject = subject if chance(0.25) else f"{colour} {subject}"
    style = int(torch.randint(4, (), generator=generator))
    if style == 0:
        parts = [subject, motion, place if where else "", time if when else ""]
        return ", ".join(p for p in parts if p)
    if style == 1:
        text = f"{when + ', ' if when else ''}a {subject} {motion} {where}"
    elif style == 2:
        text = f"{where + ', ' if where else ''}a {subject} {motion} {when}"
    else:
        article, verb = "the" if chance(0.3) else "a", "is" if motion and chance(0.1) else ""
        text = f"{article} {subject} {verb} {motion} {where} {when}"
    return " ".join(text.split())


def parse(caption: str) -> list[int]:
    """Attribute indices named by a caption, `UNSPECIFIED` where it names none; time defaults to day."""
    found = dict.fromkeys(ATTRIBUTES, UNSPECIFIED)
    for word in re.findall(r"[a-z]+", caption.lower()):
        name, index = _LOOKUP.get(word, ("", 0))
        if name and found[name] == UNSPECIFIED:
            found[name] = index
    if found["time"] == UNSPECIFIED:
        found["time"] = 0
    return list(found.values())


def vocabulary() -> dict[str, Any]:
    """The content of vocabulary.json: words by attribute, their canonical values, harmless words and examples."""
    return {
        "attributes": {name: [word for group in groups for word in group] for name, groups in WORDS.items()},
        "canonical": {word: ATTRIBUTES[name][index] for word, (name, index) in _LOOKUP.items()},
        "ignored": list(IGNORED),
        "examples": list(EXAMPLES),
    }


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, words and punctuation; anything else is one unknown token."""
    words = ["<pad>", "<start>", "<unknown>", "<end>", ",", "."]
    words += [word for groups in WORDS.values() for group in groups for word in group]
    words += list(IGNORED)
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unknown>"))
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<start>",
        eos_token="<end>",
        unk_token="<unknown>",
        model_max_length=MAX_TOKENS,
    )


def tokenise(tokenizer: PreTrainedTokenizerFast, captions: list[str]) -> Tensor:
    """Token ids [B, MAX_TOKENS], padded and cut."""
    encoded = tokenizer(captions, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]
    return ids
