"""Names the files of a checkpoint folder that can't be read, and what helps."""

import itertools
import re
from pathlib import Path

from influence_cli.errors import CheckpointError, listed

PICKLED = {".pt", ".pth", ".ckpt", ".bin"}
# what trainers put beside weights
NO_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|training_args|rng_state.*|.*optim_states)\.\w+"
)
MOST_FILES = 10_000  # that a search looks at
ADAPTER, DISTRIBUTED, PICKLE = "peft adapters", "torch.distributed shards", "pickled files"
# files of a checkpoint that is a folder
IN_FOLDERS = re.compile(r"adapter_model\.(safetensors|bin)|pytorch_model.*\.bin|.*\.distcp")
REMEDIES = {
    ADAPTER: "influence reads adapter_model.safetensors in folders checkpoint-N, "
    "and converts adapter_model.bin",
    DISTRIBUTED: "gather their shards in one file each",
    PICKLE: "pickled files are never opened here, because they can run code; "
    "convert reads only their tensors",
}


def kind_of(path: Path) -> str | None:
    """What a file is, by its name; None for a file that is no checkpoint."""
    if path.name.startswith("adapter_model."):
        return ADAPTER
    if path.suffix == ".distcp":
        return DISTRIBUTED
    return PICKLE if path.suffix in PICKLED else None


def find_unreadable_folders(place: Path, readable: list[Path]) -> dict[str, list[str]]:
    """kind -> names of the numbered folders that hold a checkpoint of that kind and none that this
    package reads."""
    unreadable: dict[str, list[str]] = {}
    for folder in sorted(place.iterdir()):
        if folder in readable or not folder.is_dir() or not re.search(r"\d$", folder.name):
            continue
        kinds = {kind_of(path) for path in folder.iterdir() if IN_FOLDERS.fullmatch(path.name)}
        for kind in kinds - {None}:
            unreadable.setdefault(str(kind), []).append(folder.name)
    return unreadable


def suggest_conversion(place: Path, run: Path, path: Path) -> str:
    """The command that makes readable checkpoints of a file or folder `path` and those beside it.

    In a Trainer's own folder, influence then reads RUN/checkpoints instead of the folder.
    """
    in_folder = IN_FOLDERS.fullmatch(path.name) and path.parent != place
    source = path.parent.parent if in_folder else path.parent
    target = run / ("checkpoints" if place == run else "converted")
    then = "" if place == run else f", then --checkpoints {target}"
    return f"influence convert {source} {target}{then}"


def describe_mixed_folder(place: Path, unreadable: dict[str, list[str]]) -> CheckpointError:
    """The error for checkpoints that would be skipped beside others that can be read."""
    is_run = (place / "definition.py").is_file()  # then no step-N in it counts
    target = place / "checkpoints" if is_run else place
    then = "move the readable ones there, too" if is_run else "move these folders out of this one"
    return CheckpointError(
        f"{place} holds checkpoints that can't be read, beside others",
        *(f"{kind}: {listed(names)}" for kind, names in unreadable.items()),
        *(REMEDIES[kind] for kind in unreadable),
        f"influence convert {place} {target}; then {then}",
        "or move them out of this folder, to score without them",
    )


def describe_missing_checkpoints(place: Path, run: Path) -> CheckpointError:
    """The error for a folder without a readable checkpoint: what it has, and what helps."""
    unreadable: dict[str, list[Path]] = {}
    for path in sorted(itertools.islice(place.rglob("*"), MOST_FILES)):
        if (kind := kind_of(path)) and not NO_WEIGHTS.fullmatch(path.name):
            unreadable.setdefault(kind, []).append(path)
    elsewhere = sorted(
        {
            str(path.parent if path.name.startswith("step-") else path.parent.parent)
            for path in itertools.islice(run.rglob("*.safetensors"), MOST_FILES)
            if re.search(r"(step|checkpoint)[-_]\d+(/model|)[^/]*$", str(path))
            and ".influence" not in path.parts
            and not kind_of(path)
        }
        - {str(place)}
    )
    own = (
        place / "checkpoints" if place == run else place
    )  # of a run's own folder, no step-N counts
    return CheckpointError(
        f"no checkpoints in {place}",
        "expected: step-000100.safetensors ..., "
        "or Trainer folders checkpoint-100/model.safetensors (or its index file)",
        *(
            line
            for kind, paths in unreadable.items()
            for line in (
                f"found {kind}: {listed(path.relative_to(place) for path in paths)}; "
                f"{REMEDIES[kind]}:",
                suggest_conversion(place, run, paths[0]),
            )
        ),
        *(f"found checkpoints in {folder}: --checkpoints {folder}" for folder in elsewhere[:3]),
        f"save them with safetensors.torch.save_model(model, '{own}/step-000100.safetensors', "
        "{'learning_rate': '0.1'})",
    )
