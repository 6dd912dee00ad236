"""Headers: other files are refused by what is wrong with them."""

import struct
from pathlib import Path

import pytest

from streamt2v.errors import WeightsError
from streamt2v.weights import header


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not a safetensors file"),
        (b"text", "not a safetensors file"),
        (b"some longer text that is no weights file at all", "not a safetensors file"),
        (struct.pack("<Q", 2**40) + b"{}", "not a safetensors file"),
        (struct.pack("<Q", 100) + b"{}", "truncated"),
        (struct.pack("<Q", 2) + b"[]", "header is damaged"),
        (struct.pack("<Q", 2) + b"{]", "header is damaged"),
        (struct.pack("<Q", 2) + b"{}", "format 'none'"),
        (struct.pack("<Q", 2) + b"{}more", "has bytes after its end"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=said) as caught:
        header.read_header(path)
    assert caught.value.exit_code == 4
