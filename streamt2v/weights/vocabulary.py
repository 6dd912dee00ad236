"""The words a family knows: families trained on a small world come with a list, others take any text."""

import json
import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Vocabulary:
    """The words of a family by attribute, words that it ignores, and what synonyms stand for."""

    attributes: dict[str, tuple[str, ...]]
    ignored: frozenset[str]
    canonical: dict[str, str]

    def unknown_words(self, prompt: str) -> tuple[str, ...]:
        """Return the words of a prompt that the family was not trained on, in order, each once."""
        known = {word for phrases in self.attributes.values() for phrase in phrases for word in words_of(phrase)}
        unknown = (word for word in words_of(prompt) if word not in known and word not in self.ignored)
        return tuple(dict.fromkeys(unknown))

    def hint(self) -> str:
        """Return one line with everything it knows, without synonyms."""
        first = {
            name: dict.fromkeys(self.canonical.get(p, p) for p in phrases) for name, phrases in self.attributes.items()
        }
        return "; ".join(f"{name}: {', '.join(phrases)}" for name, phrases in first.items())


def words_of(text: str) -> list[str]:
    """Split a text into lower-case words."""
    return re.findall(r"\w+", text.lower())


def load(path: Path) -> Vocabulary:
    """Read a vocabulary file."""
    table = json.loads(path.read_text(encoding="utf-8"))
    attributes = {name: tuple(phrases) for name, phrases in table["attributes"].items()}
    return Vocabulary(attributes, frozenset(table.get("ignored", ())), table.get("canonical", {}))
