"""Weights: which files a family has, whether they are installed and intact, and how a file becomes a network.

The rest of the package uses the names below, and the modules `hub`, `home`, `convert` and `vocabulary`. Nothing heavy
is imported until a file is loaded.
"""

from streamt2v.weights.catalog import PACKAGE, Family, WeightFile, families, helpers, listed, pipelines
from streamt2v.weights.folders import family
from streamt2v.weights.header import read_header, read_index
from streamt2v.weights.inventory import (
    contents,
    default_family,
    describe_families,
    describe_files,
    describe_snapshot,
    folder_of,
    interpolator,
    is_absent,
    missing,
    require,
    snapshot_of,
    verify,
    verify_snapshot,
)
from streamt2v.weights.networks import build, furnish, load, load_module, quiet, save_module, shapes
from streamt2v.weights.tokenizer import load_tokenizer

__all__ = [
    "PACKAGE", "Family", "WeightFile", "build", "contents", "default_family", "describe_families", "describe_files",
    "describe_snapshot", "families", "family", "folder_of", "furnish", "helpers", "interpolator", "is_absent", "listed",
    "load", "load_module", "load_tokenizer", "missing", "pipelines", "quiet", "read_header", "read_index", "require",
    "save_module", "shapes", "snapshot_of", "verify", "verify_snapshot",
]  # fmt: skip
