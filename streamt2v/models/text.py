"""Prompts before they become tokens. No torch here: only how a text is cleaned."""

import html
import re
import unicodedata

_CURLED_QUOTES = str.maketrans("\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f", "''''\"\"\"\"")
_WIDE_OR_JOINED = re.compile("[\u0132\u0133\u0149\u01c4-\u01cc\u01f1-\u01f3\u3000\ufb00-\ufb06\uff01-\uffef]+")
_CONTROLS = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\u206a-\u206f\ufeff\ufff9-\ufffc]")


def tidied(prompt: str) -> str:
    """Resolve entities, and join words by single spaces."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


def clean_prompt(prompt: str) -> str:
    """Clean a prompt as the refiner's tokenizer does: entities, plain quotes and letters, single spaces, lower case.

    The published tokenizer also tries to repair text decoded in the wrong encoding; this does not.
    """
    text = prompt if "<" in prompt else html.unescape(prompt)
    text = _WIDE_OR_JOINED.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text).translate(_CURLED_QUOTES)
    text = unicodedata.normalize("NFC", _CONTROLS.sub("", text))
    return tidied(text).lower()
