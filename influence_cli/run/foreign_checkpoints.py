"""Names the files of a checkpoint folder that can't be read, and what helps."""

import itertools
import re
from pathlib import Path

from influence_cli.errors import CheckpointError, listed

PICKLED = {".pt", ".pth", ".ckpt", ".bin"}
MOST_FILES = 10_000  # that a search looks at
ADAPTER, DISTRIBUTED, PICKLE = "peft adapters", "torch.distributed shards", "pickled files"
REMEDIES = {
    ADAPTER: "merge each adapter: peft's model.merge_and_unload(), then save_model",
    DISTRIBUTED: "convert each: torch.distributed.checkpoint.format_utils.dcp_to_torch_save(), "
    "then load the result yourself and save_model",
    PICKLE: "pickled files are never opened, because they can run code",
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
        names = {"adapter_model.safetensors", "adapter_model.bin", "pytorch_model.bin"}
        kinds = {
            kind_of(path)
            for path in folder.iterdir()
            if path.name in names or path.suffix == ".distcp"
        }
        for kind in kinds - {None}:
            unreadable.setdefault(str(kind), []).append(folder.name)
    return unreadable


def describe_mixed_folder(place: Path, unreadable: dict[str, list[str]]) -> CheckpointError:
    """The error for checkpoints that would be skipped beside others that can be read."""
    return CheckpointError(
        f"{place} holds checkpoints that can't be read, beside others",
        *(f"{kind}: {listed(names)}" for kind, names in unreadable.items()),
        *(REMEDIES[kind] for kind in unreadable),
        "or move them out of this folder, to score without them",
    )


def describe_missing_checkpoints(place: Path, run: Path) -> CheckpointError:
    """The error for a folder without a readable checkpoint: what it has, and what helps."""
    unreadable: dict[str, list[str]] = {}
    for path in sorted(itertools.islice(place.rglob("*"), MOST_FILES)):
        if kind := kind_of(path):
            unreadable.setdefault(kind, []).append(str(path.relative_to(place)))
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
        *(f"found {kind}: {listed(names)}; {REMEDIES[kind]}" for kind, names in unreadable.items()),
        *(f"found checkpoints in {folder}: --checkpoints {folder}" for folder in elsewhere[:3]),
        f"save them with safetensors.torch.save_model(model, '{own}/step-000100.safetensors', "
        "{'learning_rate': '0.1'})",
    )
