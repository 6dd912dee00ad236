"""The commands around weights: list, pull, path, verify and convert; and train."""

import json
from pathlib import Path
from typing import Annotated

from streamt2v import config, devices, training, weights
from streamt2v.cli import options
from streamt2v.cli.options import argument, option
from streamt2v.cli.terminal import FETCHING, emit, say, terminable
from streamt2v.errors import ConfigError
from streamt2v.families import choose
from streamt2v.weights import folders, home, hub


def weights_list(
    name: Annotated[str | None, argument("A name from this list, to see its files and their origin.")] = None,
    json_output: options.Json = False,
) -> None:
    """List the model families with state, size and licence, or the files of one family.

    [b]streamt2v weights list[/b]

    [b]streamt2v weights list streamingt2v[/b]
    """
    if name is None:
        rows = weights.describe_families()
    elif (family := weights.listed(name)) is None:
        rows = weights.describe_snapshot(name)
    else:
        rows = weights.describe_files(family)
    if json_output:
        emit(json.dumps(rows))
        return
    width = max((len(row["name"]) for row in rows), default=0)
    for row in rows:
        size = f"{row['bytes'] / 1e6:,.1f} MB" if row["bytes"] else "said by pull"
        emit(f"{row['name']:<{width}}  {row['state']:<10} {size:>13}  {row['licence']}")
        if said := "; ".join(filter(None, (row["what"], row.get("origin", "")))):
            emit(f"    {said}")


def weights_pull(
    name: Annotated[str, argument("A name from `weights list`.", autocompletion=options.names_of_weights)],
    source: Annotated[
        str, option("--source", "Which published copy to take if there are several; see `weights list NAME`.")
    ] = "",
    folder: Annotated[Path | None, option("--from", "Folder of published files that are already here.")] = None,
    no_refine: Annotated[bool, option("--no-refine", "Leave out what only the refiner needs.")] = False,
    refiner: Annotated[
        str | None, option("--refiner", "The model that will refine, as in generate: own is the family's.")
    ] = None,
) -> None:
    """Fetch a model family and convert it to 16-bit safetensors, or fetch a model for the first frames as it is.

    Prints the size first, and resumes an interrupted download. Files can be placed by hand: published ones in any
    folder (--from), converted ones in the folder that `weights path NAME` prints. --offline makes no connection.

    [b]streamt2v weights pull streamingt2v[/b]

    [b]streamt2v weights pull streamingt2v --source original --from ~/downloads[/b]

    [b]streamt2v weights pull streamingsvd --no-refine[/b]

    [b]streamt2v weights pull svd[/b]
    """
    from streamt2v.weights import convert as checkpoints

    with terminable(FETCHING):
        if (family := weights.listed(name)) is None:
            if source or folder or no_refine or refiner:
                hint = "leave --source, --from, --no-refine and --refiner out"
                raise ConfigError(f"{name} comes from its repository alone", hint)
            folders.locate(name, say)
        else:
            usual = config.merge(config.preset(family.preset) if family.preset else {})
            refines = None if no_refine else refiner or usual.refine.model
            stages = None if refines == choose.OWN else ("initialize", "stream")
            hub.pull(family, checkpoints.convert, say, source, folder, stages)
            for model, does in ((usual.initialize.text_model, "makes the first frames"), (refines, "refines")):
                if model not in (None, choose.OWN):
                    say(f"{model}, which {does}:")
                    folders.locate(model, say)
    emit(f"{name}: ready")


def weights_path(name: options.WeightsName = None) -> None:
    """Print the folder of all weights, or of one name from `weights list`. STREAMT2V_HOME sets it.

    [b]streamt2v weights path streamingt2v[/b]
    """
    emit(str(weights.folder_of(name) if name else home.path()))


def weights_verify(name: options.WeightsName = None) -> None:
    """Check all weight files, or those of one name, against their recorded sizes and SHA-256.

    [b]streamt2v weights verify[/b]

    [b]streamt2v weights verify svd[/b]
    """
    for one in [name] if name else [row["name"] for row in weights.describe_families() if row["state"] != "absent"]:
        if (family := weights.listed(one)) is None:
            count = weights.verify_snapshot(one)
        else:
            weights.verify(family)
            count = sum(len(file.parts) for file in family.files)
        emit(f"{one}: {count} files, all as recorded")


def weights_convert(
    source: Annotated[Path, argument("A published checkpoint, or its folder.")],
    destination: Annotated[Path, argument("Folder for the converted files.")],
) -> None:
    """Convert a published checkpoint to files that streamt2v loads: 16 bit, no pickle, no optimizer state.

    Known: streaming_t2v.ckpt, VidXTend (file or folder), StreamingSVD, the three files of MS-Vid2Vid-XL, OpenCLIP,
    RIFE 4.26.

    [b]streamt2v weights convert streaming_t2v.ckpt weights/[/b]
    """
    from streamt2v.weights import convert as checkpoints

    for path in checkpoints.convert(source, destination, say):
        emit(str(path))


def train(
    part: Annotated[str, argument(f"{', '.join(training.PARTS[:-1])} or {training.PARTS[-1]}.")],
    minutes: Annotated[float | None, option("--minutes", "Stop after this many minutes.")] = None,
    steps: Annotated[int | None, option("--steps", "Stop after this many optimizer steps.")] = None,
    out: Annotated[Path, option("--out", "Folder for checkpoints, log and sample sheets.")] = Path("training"),
    resume_from: Annotated[
        Path | None, option("--from", "Folder of weights to start from, such as streamt2v/demo. Default: start afresh.")
    ] = None,
    device: options.Device = "auto",
    seed: Annotated[int, option("--seed", "Seed of the data and the initial weights.")] = 0,
    steady: Annotated[bool, option("--steady", "Keep the learning rate, for a run that will be continued.")] = False,
    afresh: Annotated[bool, option("--afresh", "Discard the state of an earlier run of this part.")] = False,
) -> None:
    """Train one part of the demo family on the drawn world. Repeating the command continues an interrupted run.

    [b]streamt2v train images --minutes 60 --out training[/b]
    """
    training.check(part, training.PARTS, minutes, steps)
    devices.glance(device)  # knows without torch that it is not there
    from streamt2v.training import loop

    loop.train(
        part,
        minutes=minutes,
        steps=steps,
        out=out,
        device=devices.resolve(device).name,
        seed=seed,
        resume_from=resume_from,
        steady=steady,
        afresh=afresh,
        log=say,
    )
