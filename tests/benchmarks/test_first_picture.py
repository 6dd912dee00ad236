"""The benchmark of the first picture: what it looks at appears in a real run, base frames first."""

from pathlib import Path

import pytest

from benchmarks import first_picture
from tests.cli.helpers import PROMPT, TINY


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processor time is read from Linux")
def test_base_frames_are_seen_before_the_file_plays() -> None:
    found = first_picture.follow([PROMPT, "--frames", "400", *TINY])
    assert list(found) == ["watch", "file"]
    (seen, busy), (played, busier) = found.values()
    assert 0 < seen <= played
    assert 0 < busy <= busier


def test_a_run_that_fails_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="ended before"):
        first_picture.follow(["", "--frames", "8"])
