"""Texts to token numbers: tokenizers from files, and CLIP's, which no published checkpoint contains."""

import lzma
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from streamt2v.errors import WeightsError
from streamt2v.weights.catalog import PACKAGE

if TYPE_CHECKING:
    import tokenizers


class Tokenizer:
    """A tokenizer from a file, with the part of transformers' interface that `models.encoders` uses.

    The pad token only fills up: where a text holds it, it is a word like others.
    """

    def __init__(self, backend: "tokenizers.Tokenizer", pad: str) -> None:
        self.backend, self.pad = backend, pad
        self.pad_id = backend.token_to_id(pad)
        backend.no_padding()
        backend.no_truncation()

    def __call__(
        self,
        texts: Sequence[str],
        padding: str = "",
        truncation: bool = False,
        max_length: int = 0,
        return_tensors: str = "",
    ) -> Any:
        """Return an object with `input_ids` and `attention_mask`: a list for each text, or tensors [B, max_length].

        The mask is 1 for tokens of the text and 0 for what fills up.

        Args:
            texts: any number of them.
            padding: "max_length" fills up to `max_length` tokens.
            truncation: cut what is longer, before the end token.
            max_length: see there.
            return_tensors: "pt" for a tensor.
        """
        if truncation:
            self.backend.enable_truncation(max_length)
        if padding == "max_length":
            self.backend.enable_padding(length=max_length, pad_id=self.pad_id, pad_token=self.pad)
        encoded = [self.backend.encode(text) for text in texts]
        ids: Any = [text.ids for text in encoded]
        mask: Any = [text.attention_mask for text in encoded]
        self.backend.no_padding()
        self.backend.no_truncation()
        if return_tensors:
            import torch

            ids, mask = torch.tensor(ids), torch.tensor(mask)
        return SimpleNamespace(input_ids=ids, attention_mask=mask)


def load_tokenizer(path: Path, pad: str) -> Tokenizer:
    """Load a tokenizer from its `tokenizer.json`; `pad` is the token that fills short texts up.

    Raises:
        WeightsError: the file is missing, not a tokenizer, or one without such a token.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing", "install streamt2v again")
    import tokenizers

    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a bare Exception for a file it cannot read
        raise WeightsError(f"{path} is not a tokenizer: {error}", "run `streamt2v weights verify`") from error
    if backend.token_to_id(pad) is None:
        raise WeightsError(f"{path} has no token {pad!r} to fill short texts up", "run `streamt2v weights verify`")
    return Tokenizer(backend, pad)


def clip_tokenizer(length: int = 77, pad_id: int = 0) -> "tokenizers.Tokenizer":
    """Build the tokenizer: texts are padded with `pad_id`, or cut before the end token, to `length` tokens.

    The published models pad with 0, although CLIP itself pads with the end token.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [*map(chr, printable), *(chr(256 + index) for index in range(256 - len(printable)))]
    with lzma.open(PACKAGE / "clip" / "merges.txt.xz", "rt", encoding="utf-8") as merges:  # 48,894, the first one first
        pairs = [(left, right) for left, right in map(str.split, merges)]
    start, end = "<|startoftext|>", "<|endoftext|>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, pairs), start, end]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token=end, end_of_word_suffix="</w>"))
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    pattern = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
    split = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, vocabulary[start]), (end, vocabulary[end])]
    )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad_id, pad_token=words[pad_id])
    return tokenizer
