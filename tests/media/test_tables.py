"""Tables as spreadsheets write them: read as they are meant, or refused with the line and the reason.

Reported for other tools as thephpleague/csv#543, votingworks/arlo#525, firefly-iii/firefly-iii#1262.
"""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamt2v.batch import rows
from streamt2v.errors import ConfigError

PLAIN = [(2, {"prompt": "a red ball", "frames": "24"}), (3, {"prompt": "a blue star", "frames": "32"})]
TABLE = "prompt,frames\r\na red ball,24\r\na blue star,32\r\n"
SAME = {
    "as it is": TABLE.encode(),
    "BOM": b"\xef\xbb\xbf" + TABLE.encode(),
    "UTF-16": TABLE.encode("utf-16"),
    "UTF-16 big-endian": b"\xfe\xff" + TABLE.encode("utf-16-be"),
    "UTF-16 without BOM": TABLE.encode("utf-16-le"),
    "UTF-16 big-endian without BOM": TABLE.encode("utf-16-be"),
    "UTF-32": TABLE.encode("utf-32"),
    "semicolons": TABLE.replace(",", ";").encode(),
    "tabs": TABLE.replace(",", "\t").encode(),
    "spaces": b" prompt , frames \r\n a red ball ,  24\r\na blue star  ,32 \r\n",
    "two empty columns": b"prompt,frames,,\r\na red ball,24,,\r\na blue star,32,,\r\n",
    "an empty column in the middle": b"prompt,,frames,\r\na red ball,,24,\r\na blue star,,32,\r\n",
    "an empty column first": b",prompt,frames\r\n,a red ball,24\r\n,a blue star,32\r\n",
    "columns of blanks": b"prompt,frames, ,  \r\na red ball,24, ,\r\na blue star,32\r\n",
    "empty columns without names": b"prompt,frames\r\na red ball,24,,,\r\na blue star,32,,\r\n",
    "quotes": b'"prompt","frames"\r\n"a red ball","24"\r\n"a blue star","32"\r\n',
    "Mac lines": b"prompt,frames\ra red ball,24\ra blue star,32\r",
    "Unix lines without an end": b"prompt,frames\na red ball,24\na blue star,32",
}
SHIFTED = {
    "empty rows": (b"prompt,frames\r\n,\r\na red ball,24\r\n\r\n , \r\na blue star,32\r\n,,\r\n", [3, 6]),
    "empty rows before the header": (b"\r\n,,\r\nprompt,frames\r\na red ball,24\r\na blue star,32\r\n", [4, 5]),
    "sep=": (b"sep=;\r\nprompt;frames\r\na red ball;24\r\na blue star;32\r\n", [3, 4]),
    "sep= of another mark": (b"\xef\xbb\xbfsep=|\r\nprompt|frames\r\na red ball|24\r\na blue star|32\r\n", [3, 4]),
}


def read(path: Path, data: bytes) -> list[rows.Row]:
    path.write_bytes(data)
    return rows.read(str(path))


@pytest.mark.parametrize("name", SAME)
def test_all_of_these_are_one_table(name: str, tmp_path: Path) -> None:
    assert [(row.line, row.fields) for row in read(tmp_path / "a.csv", SAME[name])] == PLAIN
    assert not any(row.error for row in rows.read(str(tmp_path / "a.csv")))


@pytest.mark.parametrize("name", SHIFTED)
def test_lines_are_those_of_the_file(name: str, tmp_path: Path) -> None:
    data, lines = SHIFTED[name]
    assert [(row.line, row.fields) for row in read(tmp_path / "a.csv", data)] == [
        (line, fields) for line, (_, fields) in zip(lines, PLAIN, strict=True)
    ]


def test_commas_inside_and_other_languages(tmp_path: Path) -> None:
    data = 'prompt;frames\n"a red ball; at night, by the sea";24\nein grüner Würfel;24\n'
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        found = read(tmp_path / "a.csv", data.encode(encoding))
        assert [row.fields["prompt"] for row in found] == ["a red ball; at night, by the sea", "ein grüner Würfel"]
    assert read(tmp_path / "a.txt", "a red ball\r\n\r\nein Würfel\r\n".encode("utf-16"))[1].fields == {
        "prompt": "ein Würfel"
    }
    assert read(tmp_path / "a.jsonl", '{"prompt": "ü"}\n'.encode("utf-16"))[0].fields == {"prompt": "ü"}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"prompt,frames,prompt\na,1,b\n", "two columns in line 1 have the same name, 'prompt'"),
        (b"\n\nprompt,prompt\na,b\n", "two columns in line 3"),
        (b",,\n\n", "holds no jobs"),
        (b"prompt\n", "holds no jobs"),
    ],
)
def test_what_cannot_be_meant_is_refused(data: bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        read(tmp_path / "a.csv", data)


def test_a_cell_without_a_name_is_an_error_of_its_row(tmp_path: Path) -> None:
    found = read(tmp_path / "a.csv", b"prompt,frames,,\na red ball,24,,\na blue star,32,,12\na,1,2,3,4\n")
    assert [bool(row.error) for row in found] == [False, True, True]
    assert (found[1].line, found[1].error) == (3, "cell 4 is in a column without a name: '12'")


NAMES = st.text("abc xyz", min_size=1, max_size=6).map(str.strip).filter(bool)
CELLS = st.text("abcäö 12\"',;\n", max_size=8)


@given(st.lists(NAMES, min_size=2, max_size=4, unique=True), st.data(), st.sampled_from(",;\t"))
def test_what_a_spreadsheet_writes_is_read(names: list[str], data: st.DataObject, mark: str) -> None:
    import csv
    import io

    table = data.draw(st.lists(st.lists(CELLS, min_size=len(names), max_size=len(names)), max_size=4))
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=mark).writerows([names, *table])
    wanted = [{name: cell.strip() for name, cell in zip(names, row, strict=True) if cell.strip()} for row in table]
    found = list(rows._read_csv(rows._text(out.getvalue().encode("utf-16"))))
    assert [row.fields for row in found] == [fields for fields in wanted if fields]
