"""Converts checkpoints of other formats to safetensors files with step and learning rate."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from influence_cli.errors import CheckpointError, UsageProblem, listed
from influence_cli.integrations.checkpoint_sources import (
    MODEL,
    MODEL_INDEX,
    Source,
    find_sources,
    list_readable,
    list_skipped,
    read_step,
)
from influence_cli.integrations.converted_files import copy_once, write_once
from influence_cli.integrations.distributed_files import read_distributed
from influence_cli.integrations.pickled_files import read_pickled
from influence_cli.integrations.saved_weights import SavedWeights, read_weights
from influence_cli.progress import Reporter
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.learning_rates import find_trainer_rate
from influence_cli.run.optimizer_state import checkpoint_name
from influence_cli.storage.json_text import read_json_file

ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Conversion:
    """One checkpoint to write. `adapter`: under the names that peft gives the files."""

    source: Source
    weights: SavedWeights
    step: int
    adapter: bool = False


def convert_lightning(
    folder: Path, target: Path, reporter: Reporter, placeholders: bool = False
) -> list[Path]:
    """Converts the `.ckpt` files of a folder, such as lightning_logs/version_0/checkpoints, or one
    file. Returns the files of `target`, one a step. Finished files are not written again."""
    return convert_checkpoints(folder, target, reporter, placeholders)


def convert_checkpoints(
    place: Path,
    target: Path,
    reporter: Reporter,
    placeholders: bool = False,
    base: Path | None = None,
) -> list[Path]:
    """Converts the checkpoints of a file or folder. `target`: a folder, or a .safetensors file for
    one checkpoint. `base`: the folder of the weights to merge adapters into.

    Returns the files in `target`, written now or before. Raises CheckpointError, UsageProblem.
    """
    sources = find_sources(place)
    if target.suffix == ".safetensors" and len(sources) > 1:
        raise UsageProblem(
            f"TO names one file, and {place} holds {len(sources)} checkpoints",
            f"found: {listed(source.path.name for source in sources)}",
            "name a folder",
        )
    if target.absolute() != place.absolute() and (readable := list_readable(place)):
        reporter.note(
            f"{listed(readable)} in {place}: influence reads these as they are, and convert does "
            "not copy them"
        )
    if skipped := list_skipped(place, sources):
        reporter.note(
            f"not converted, for want of a step: {listed(skipped)}. Convert it by itself, with a "
            "file name as TO"
        )
    files: dict[Path, Source] = {}
    with reporter.progress("checkpoints", len(sources)) as advance:
        for source in sources:
            conversion = read_source(source, target, placeholders, base)
            path = name_target(conversion, target)
            write_conversion(conversion, path, reporter, files)
            files.setdefault(path, source)
            advance(1, source.path.name)
    return list(files)


def read_source(source: Source, target: Path, placeholders: bool, base: Path | None) -> Conversion:
    """Reads a checkpoint. Step and learning rate come from the content or the files beside it."""
    path = source.path
    if base is not None and source.kind != "adapter":
        raise UsageProblem(
            f"--base merges adapters, and {path} holds none",
            "expected: folders with adapter_config.json and adapter_model.safetensors or .bin",
            "leave --base out",
        )
    if source.kind == "adapter" and base is not None:
        from influence_cli.integrations.merged_adapters import merge_adapter

        weights = SavedWeights(merge_adapter(path, base, placeholders))
    else:
        weights = read_weights(read_content(source, placeholders), path.name)
    step, notes = find_step(source, weights, target)
    weights = replace(weights, notes=(*weights.notes, *notes))
    if not weights.rates and source.kind in ("model", "adapter"):
        weights = add_trainer_rate(path, step, weights)
    return Conversion(source, weights, step, adapter=source.kind == "adapter" and base is None)


def read_content(source: Source, placeholders: bool) -> Any:  # Any: whatever a file holds
    path = source.path
    if source.kind == "distributed":
        return read_distributed(path)
    if source.kind == "file":
        return read_pickled(path, placeholders)
    if source.kind == "adapter":
        if not (path / "adapter_model.bin").is_file():
            raise UsageProblem(
                f"{path / 'adapter_model.safetensors'} is a safetensors file already",
                "influence reads adapters over the base weights as they are",
                "--base DIR merges them into the weights of DIR, if you want full checkpoints",
            )
        return read_pickled(path / "adapter_model.bin", placeholders)
    if (path / MODEL).is_file():
        return read_pickled(path / MODEL, placeholders)
    return read_shards(path, placeholders)


def read_shards(folder: Path, placeholders: bool) -> dict[str, Any]:  # Any: as above
    """The tensors of pytorch_model.bin.index.json and its shards."""
    try:
        weight_map = read_json_file(folder / MODEL_INDEX)["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise CheckpointError(
            f"{folder / MODEL_INDEX} can't be read: {type(error).__name__} {error}",
            "expected: an object with `weight_map`",
        ) from error
    absent = [name for name in names if not (folder / name).is_file()]
    if outside or absent:
        raise CheckpointError(
            f"{folder / MODEL_INDEX} names files that are not beside it",
            f"missing: {listed(outside or absent)}",
            "copy the missing shards",
        )
    content: dict[str, Any] = {}  # Any: as above
    for name in names:
        content |= read_pickled(folder / name, placeholders)
    if lost := sorted(weight_map.keys() - content.keys()):
        raise CheckpointError(
            f"{folder / MODEL_INDEX} names tensors that its shards lack: {listed(lost)}",
            "copy the shards again",
        )
    return content


# ---------------------------------------------------------------- step and learning rate
def find_step(source: Source, weights: SavedWeights, target: Path) -> tuple[int, tuple[str, ...]]:
    """The step that the content gives, else the name, else TO, else the epoch; and notes on it.

    Raises CheckpointError where two of them differ, or there is none.
    """
    named, is_explicit = read_step(source.path)
    wanted = read_step(target)[0] if target.suffix == ".safetensors" else None
    claims = {
        f"its content says step {weights.step}": weights.step,
        f"its name says step {named}": named if is_explicit else None,
    }
    known = {text: step for text, step in claims.items() if step is not None}
    if wanted is not None and (wanted in known.values() or not known):
        return wanted, ()
    steps = {*known.values(), *([] if wanted is None else [wanted])}
    if len(steps) > 1:
        raise CheckpointError(
            f"{source.path} has two steps",
            "; ".join([*known, *([] if wanted is None else [f"TO says step {wanted}"])]),
            "name the right one of the first two in TO, such as TO/step-000100.safetensors",
        )
    for step in (*steps, named):
        if step is not None:
            return step, ()
    if weights.epoch is not None:
        note = f"{source.path.name}: its epoch, {weights.epoch}, stands for the step"
        return weights.epoch, (note,)
    raise CheckpointError(
        f"the step of {source.path} is unknown",
        "found: no number in its name, and no step in its content",
        f"name it in TO: influence convert {source.path} "
        f"{target.with_suffix('') if target.suffix else target}/step-000100.safetensors",
    )


def add_trainer_rate(folder: Path, step: int, weights: SavedWeights) -> SavedWeights:
    """Adds the learning rate of a Trainer's files: trainer_state.json, else scheduler.pt."""
    state = folder / "trainer_state.json"
    weight = find_trainer_rate(
        Checkpoint(step, folder, (), None, state if state.is_file() else None)
    )
    return weights if weight is None else replace(weights, rates=weight.rates)


def describe_metadata(conversion: Conversion, reporter: Reporter) -> dict[str, str]:
    """The metadata of a converted file. A rate of 0 or several rates are named, not written."""
    step, rates = conversion.step, conversion.weights.rates
    metadata = {"step": str(step)}
    name = conversion.source.path.name
    if len(rates) == 1 and rates[0] > 0:
        metadata["learning_rate"] = repr(rates[0])
    elif len(rates) > 1:
        reporter.note(
            f"{name}: parameter groups have the learning rates "
            f"{listed(f'{rate:g}' for rate in rates)}, so none is written; score with --lr X"
        )
    elif rates:
        reporter.note(
            f"{name}: its learning rate is 0, because its schedule has ended; none is written. "
            "Score with --lr X or --lr-weights none, or leave it out with --steps"
        )
    else:
        reporter.note(f"{name}: no learning rate; score with --lr X, or --lr-weights none")
    return metadata


# ---------------------------------------------------------------- writing
def name_target(conversion: Conversion, target: Path) -> Path:
    if target.suffix == ".safetensors":
        return target
    if conversion.adapter:
        return target / f"checkpoint-{conversion.step}" / "adapter_model.safetensors"
    return target / checkpoint_name(conversion.step)


def write_conversion(
    conversion: Conversion, path: Path, reporter: Reporter, files: Mapping[Path, Source]
) -> None:
    """Writes one file, unless it is there. Raises CheckpointError where another checkpoint of this
    command has the same step and other content."""
    source = conversion.source
    config = source.path / ADAPTER_CONFIG
    if conversion.adapter and not config.is_file():
        raise CheckpointError(
            f"{source.path} has no {ADAPTER_CONFIG}", "copy it from where the adapter was saved"
        )
    for note in conversion.weights.notes:
        reporter.note(note)
    metadata = describe_metadata(conversion, reporter)
    try:
        written = write_once(path, conversion.weights.tensors, metadata)
    except CheckpointError as error:
        if path not in files:
            raise
        raise CheckpointError(
            f"{files[path].path} and {source.path} have the step {conversion.step} and differ",
            *error.details[:-1],
            "convert one of them",
        ) from error
    if conversion.adapter:
        copy_once(config, path.parent / ADAPTER_CONFIG)
    if not written:
        reporter.note(f"{path} is there already, and the same")
