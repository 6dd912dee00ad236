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

from streamt2v.training.world.scenes import ATTRIBUTES

MAX_TOKENS = 24
PAD = "<pad>"
UNSPECIFIED = -1

WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    name: tuple(tuple(group.split()) for group in groups.split("/"))
    for name, groups in {
        "colour": "red crimson / green emerald / blue azure / yellow golden / purple violet / white silver",
        "subject": "ball orb sphere globe / star spark sparkle / lantern lamp candle / moon crescent",
        "motion": "left leftwards leftward / right rightwards rightward / floating floats hovering hovers bobbing "
        "bouncing bounces / rising rises up upwards ascending / circling circles circle orbiting",
        "place": "sea ocean water waves / hills meadow mountains valley fields / desert sand dunes / "
        "city town buildings skyline",
        "time": "day daytime daylight noon / sunset dusk evening dawn sunrise / night midnight moonlight",
        "weather": "clear cloudless sunny / clouds cloudy overcast / mist misty fog foggy / snow snowy winter",
    }.items()
}
"""By attribute, for each of its values: every word that names it, the canonical one first."""
DEFAULTS = {"time": 0, "weather": 0}  # what a caption means that does not name them
_CARRIERS = ("drifting", "moving", "flying", "gliding", "drifts", "moves")
_WEATHER = ("under a clear sky", "under clouds", "in mist", "in snow")
_HARMLESS = """
    a an the and is in at by on of to over above under during with bright glowing shining light paper sky scene video
    clip large big around one it that which
"""
IGNORED = (*_HARMLESS.split(), *_CARRIERS)
EXAMPLES = (
    "a red ball floating over the sea at sunset",
    "a golden lantern rising over the city at night",
    "a blue moon drifting left over the hills in mist",
    "a white star circling over the desert at night",
    "a green ball drifting right over the hills by day in snow",
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
    shade, subject, motion, place, time, weather = (
        ATTRIBUTES[name][i] for name, i in zip(ATTRIBUTES, labels, strict=True)
    )
    when = "by day" if time == "day" else f"at {time}"
    sky = "" if weather == "clear" else f" {_WEATHER[labels[5]]}"
    return f"a {shade + ' ' if colour else ''}{subject} {motion} over the {place} {when}{sky}"


def compose(labels: list[int], generator: torch.Generator) -> str:
    """A random wording of attribute indices: synonyms, other orders, sometimes a part left out.

    No time means day, no weather a clear sky. A colour left out is a hole that CAM or APM must fill from the pictures
    they see: captions that always name it leave nothing to the anchor frame.
    """

    def chance(p: float) -> bool:
        return bool(torch.rand((), generator=generator) < p)

    if chance(0.35):
        return canonical(labels, colour=not chance(0.25))
    colour, subject, motion, place, time, weather = (
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
    somewhere = not chance(0.08)
    sky = "" if labels[5] == 0 and chance(0.6) else weather
    if sky in ("clear", "cloudless") or (sky and sky.endswith("y")) or sky == "overcast":
        # An adjective: of the place, or of the sky.
        place, sky = (f"{sky} {place}", "") if somewhere and chance(0.5) else (place, f"under a {sky} sky")
    elif sky:
        sky = f"{_pick(('in', 'with'), generator)} {'the ' if chance(0.3) else ''}{sky}"
    where = f"{_pick(('over', 'above', 'in', 'at'), generator)} the {place}" if somewhere else ""
    when = "" if labels[4] == 0 and chance(0.5) else f"{_pick(('at', 'by', 'during'), generator)} {time}"
    motion = "" if chance(0.08) else motion
    subject = subject if chance(0.25) else f"{colour} {subject}"
    subject = f"glowing {subject}" if chance(0.1) else subject
    style = int(torch.randint(4, (), generator=generator))
    if style == 0:
        parts = [subject, motion, place if where else "", time if when else "", sky]
        return ", ".join(p for p in parts if p)
    if style == 1:
        text = f"{when + ', ' if when else ''}a {subject} {motion} {where} {sky}"
    elif style == 2:
        text = f"{where + ', ' if where else ''}a {subject} {motion} {when} {sky}"
    else:
        article, verb = "the" if chance(0.3) else "a", "is" if motion and chance(0.1) else ""
        text = f"{article} {subject} {verb} {motion} {where} {when} {sky}"
    return " ".join(text.split())


def parse(caption: str) -> list[int]:
    """Attribute indices named by a caption, `UNSPECIFIED` where it names none; `DEFAULTS` fill in time and weather."""
    found = dict.fromkeys(ATTRIBUTES, UNSPECIFIED)
    for word in re.findall(r"[a-z]+", caption.lower()):
        name, index = _LOOKUP.get(word, ("", 0))
        if name and found[name] == UNSPECIFIED:
            found[name] = index
    return [DEFAULTS.get(name, UNSPECIFIED) if index == UNSPECIFIED else index for name, index in found.items()]


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
    words = [PAD, "<start>", "<unknown>", "<end>", ",", "."]
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
        pad_token=PAD,
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
