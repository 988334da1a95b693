"""Finds the checkpoints of other formats in a file or folder, and the step of each."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from influence_cli.errors import UsageProblem, listed
from influence_cli.integrations.distributed_files import METADATA, is_distributed
from influence_cli.run.foreign_checkpoints import IN_FOLDERS, NO_WEIGHTS, PICKLED

MODEL, MODEL_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
READABLE = ("model.safetensors", "model.safetensors.index.json")
NAMED_STEP = re.compile(r"(?:step|checkpoint)[-_=]?(\d+)")
FORMATS = (
    "expected: .pt, .pth, .bin or .ckpt files; folders with pytorch_model.bin, adapter_model.bin "
    "or .metadata and .distcp; or a folder of such folders"
)


@dataclass(frozen=True)
class Source:
    """One checkpoint. `kind`: file, model (a Hugging Face folder), adapter or distributed."""

    path: Path
    kind: str

    @property
    def folder(self) -> Path:
        return self.path.parent if self.kind == "file" else self.path


def read_step(path: Path) -> tuple[int | None, bool]:
    """The step in a name, and whether the name says that it is one: epoch=1-step=20-v1.ckpt."""
    name = path.name if path.is_dir() else path.name.partition(".")[0]
    if match := NAMED_STEP.findall(name):
        return int(match[-1]), True
    numbers = re.findall(r"\d+", name)
    return (int(numbers[-1]) if numbers else None), False


def find_sources(place: Path) -> list[Source]:
    """All checkpoints of a file or a folder, in the order of their steps.

    Raises UsageProblem: no such file, or nothing that can be converted.
    """
    if place.is_file():
        return [describe_file(place)]
    if not place.is_dir():
        raise UsageProblem(f"no file or folder at {place}", FORMATS)
    # a Trainer may leave its last model beside the checkpoints
    if sources := list(list_sources(place)):
        return sorted(sources, key=lambda source: order_by_step(source.path))
    if kind := kind_of_folder(place):
        return [Source(place, kind)]
    if (place / "checkpoints").is_dir():  # a Lightning version folder
        return find_sources(place / "checkpoints")
    files = sorted(path for path in place.rglob("*.safetensors") if path.is_file())
    readable = [path for path in files if ".influence" not in path.parts][:3]
    raise UsageProblem(
        f"{place} holds no checkpoint that needs converting",
        FORMATS,
        *(
            [f"these are safetensors, which influence reads: {listed(readable)}"]
            if readable
            else []
        ),
    )


def describe_file(path: Path) -> Source:
    """The checkpoint of a file; its folder where the file is one part of it."""
    if path.suffix == ".safetensors":
        raise UsageProblem(
            f"{path} is a safetensors file already",
            "influence reads it as it is: put it into RUN/checkpoints",
        )
    if NO_WEIGHTS.fullmatch(path.name):
        raise UsageProblem(
            f"{path} holds no weights",
            "expected: the file or folder of a checkpoint",
            *(["--run RUN converts the state of an optimizer"] if "optim" in path.name else []),
        )
    is_part = IN_FOLDERS.fullmatch(path.name) or path.name in (METADATA, MODEL_INDEX)
    if is_part and (kind := kind_of_folder(path.parent)):
        return Source(path.parent, kind)
    return Source(path, "file")


def order_by_step(path: Path) -> tuple[bool, int, Path]:
    """Sort key: by the step in the name, those without one last."""
    step = read_step(path)[0]
    return step is None, step or 0, path


def list_sources(place: Path) -> Iterator[Source]:
    """The checkpoints in a folder: subfolders with a number in their names, and files."""
    for path in sorted(place.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if re.search(r"\d", path.name) and (kind := kind_of_folder(path)):
                yield Source(path, kind)
        elif path.suffix in PICKLED and not (
            NO_WEIGHTS.fullmatch(path.name) or IN_FOLDERS.fullmatch(path.name)
        ):
            yield Source(path, "file")


def list_skipped(place: Path, sources: Sequence[Source]) -> list[Path]:
    """Checkpoints in a folder that have no step: the folder itself, and unnumbered subfolders."""
    if not place.is_dir():
        return []
    folders = [place, *(path for path in sorted(place.iterdir()) if path.is_dir())]
    converted = {source.path for source in sources}
    return [path for path in folders if path not in converted and kind_of_folder(path)]


def kind_of_folder(folder: Path) -> str | None:
    """The kind of checkpoint that a folder is; None where it is none, or influence reads it."""
    if is_distributed(folder):
        return "distributed"
    if any((folder / name).is_file() for name in READABLE):
        return None
    if any((folder / name).is_file() for name in (MODEL, MODEL_INDEX)):
        return "model"
    return "adapter" if any((folder / name).is_file() for name in ADAPTERS) else None


def list_readable(place: Path) -> list[str]:
    """The names of a folder's checkpoints that influence reads without converting them."""
    if not place.is_dir():
        return []
    return [
        path.name
        for path in sorted(place.iterdir())
        if (path.is_dir() and any((path / name).is_file() for name in READABLE))
        or (path.is_file() and path.suffix == ".safetensors")
    ]
