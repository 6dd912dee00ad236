"""Weights: which files a family has, whether they are here and whole, and how a file becomes a network.

The names below are what the rest of the package uses; `hub`, `home`, `convert` and `vocabulary` are modules of their
own. Nothing heavy is imported before a file is loaded.
"""

from streamt2v.weights.catalog import (
    PACKAGE as PACKAGE,
)
from streamt2v.weights.catalog import (
    Family as Family,
)
from streamt2v.weights.catalog import (
    build as build,
)
from streamt2v.weights.catalog import (
    default_family as default_family,
)
from streamt2v.weights.catalog import (
    describe_families as describe_families,
)
from streamt2v.weights.catalog import (
    describe_files as describe_files,
)
from streamt2v.weights.catalog import (
    families as families,
)
from streamt2v.weights.catalog import (
    family as family,
)
from streamt2v.weights.catalog import (
    folder_of as folder_of,
)
from streamt2v.weights.catalog import (
    furnish as furnish,
)
from streamt2v.weights.catalog import (
    is_absent as is_absent,
)
from streamt2v.weights.catalog import (
    listed as listed,
)
from streamt2v.weights.catalog import (
    load as load,
)
from streamt2v.weights.catalog import (
    load_module as load_module,
)
from streamt2v.weights.catalog import (
    load_tokenizer as load_tokenizer,
)
from streamt2v.weights.catalog import (
    metadata_of as metadata_of,
)
from streamt2v.weights.catalog import (
    missing as missing,
)
from streamt2v.weights.catalog import (
    pipelines as pipelines,
)
from streamt2v.weights.catalog import (
    quiet as quiet,
)
from streamt2v.weights.catalog import (
    read_header as read_header,
)
from streamt2v.weights.catalog import (
    require as require,
)
from streamt2v.weights.catalog import (
    save_module as save_module,
)
from streamt2v.weights.catalog import (
    shapes as shapes,
)
from streamt2v.weights.catalog import (
    verify as verify,
)
from streamt2v.weights.catalog import (
    verify_snapshot as verify_snapshot,
)
