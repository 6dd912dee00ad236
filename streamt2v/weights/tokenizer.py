"""CLIP's byte-pair tokenizer, which no published checkpoint contains, built from its list of merges."""

import lzma
from typing import TYPE_CHECKING

from streamt2v.weights.catalog import PACKAGE

if TYPE_CHECKING:
    import tokenizers


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
