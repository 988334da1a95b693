"""Converts saved optimizer states to files by parameter name, as `--replay` reads them."""

import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from influence_cli.errors import CheckpointError, InfluenceError, UsageProblem, listed
from influence_cli.integrations.checkpoint_sources import read_step
from influence_cli.integrations.converted_files import write_once
from influence_cli.integrations.optimizer_names import (
    NameMap,
    Names,
    SavedOptimizer,
    describe_map,
    map_names,
)
from influence_cli.integrations.pickled_files import read_pickled
from influence_cli.integrations.saved_weights import (
    OPTIMIZERS,
    STEPS,
    as_mapping,
    find_integer,
    list_states,
)
from influence_cli.progress import Reporter
from influence_cli.run.datasets import Examples
from influence_cli.run.definition import load_definition
from influence_cli.run.optimizer_state import checkpoint_name
from influence_cli.run.parameters import build_model
from influence_cli.run.replay import Replay
from influence_cli.run.run import open_run
from influence_cli.run.trajectory import Trajectory
from influence_cli.run.trajectory_reader import read_trajectory

STATES = {
    "adam": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "sgd": {"momentum_buffer"},
}
MOST_STEPS = 200  # replayed to verify a state
LARGEST_DISTANCE = 1e-3  # relative, of a replay that verifies it


@dataclass(frozen=True)
class RunModel:
    """The model that gives the names, and the trajectory if the run has one."""

    folder: Path
    model: nn.Module
    trajectory: Trajectory | None

    @property
    def groups(self) -> Names | None:
        """The recorded groups; None where the header names none."""
        groups = self.trajectory.groups if self.trajectory else ()
        names = tuple(group.names for group in groups)
        return names if names and all(names) else None


def convert_optimizer_states(
    place: Path, target: Path, run: Path, reporter: Reporter, placeholders: bool = False
) -> list[Path]:
    """Converts optimizer.pt of a file, a checkpoint folder or a Trainer's folder; or the optimizer
    in .pt and .ckpt files. Returns the files of `target`, written now or before.

    Raises CheckpointError for a state that does not fit the run's model.
    """
    sources = find_states(place)
    own = open_model(run)
    files: dict[int, Path] = {}
    with reporter.progress("optimizer states", len(sources)) as advance:
        for source in sources:
            content = read_pickled(source, placeholders)
            saved = read_optimizer(content, source)
            mapping = map_names(saved, own.model, own.groups, source.name)
            step = find_state_step(content, source)
            path = target if target.suffix == ".safetensors" else target / checkpoint_name(step)
            name = name_optimizer(saved, own.trajectory, source, reporter)
            state = name_state(saved, mapping, name, source)
            reporter.note(describe_map(saved, mapping, own.model, source.name))
            if not write_once(path, *state):
                reporter.note(f"{path} is there already, and the same")
            files[step] = path
            advance(1, source.parent.name)
    verify_states(own, files, target, reporter)
    return list(files.values())


def find_states(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise UsageProblem(f"no file or folder at {place}", "expected: optimizer.pt, or its folder")
    if (place / "optimizer.pt").is_file():
        return [place / "optimizer.pt"]
    paths = [*place.glob("*/optimizer.pt"), *place.glob("*.ckpt")]
    if not paths:
        raise UsageProblem(
            f"{place} holds no optimizer state",
            "expected: optimizer.pt, checkpoint-N/optimizer.pt or .ckpt files",
            "name the file: influence convert FILE TO --run RUN",
        )
    return sorted(paths, key=lambda path: (state_step_of_name(path) or 0, path))


def state_step_of_name(path: Path) -> int | None:
    """The step in the name of a file, or of the folder of optimizer.pt."""
    return read_step(path.parent if path.stem == "optimizer" else path)[0]


def find_state_step(content: object, path: Path) -> int:
    mapping = as_mapping(content) or {}
    step = find_integer(mapping, STEPS) if "param_groups" not in mapping else None
    step = state_step_of_name(path) if step is None else step
    if step is None:
        raise CheckpointError(
            f"the step of {path} is unknown",
            "found: no number in the name of the file or its folder",
            "rename the folder like checkpoint-100",
        )
    return step


def open_model(run: Path) -> RunModel:
    """Raises InfluenceError kinds for a definition that can't be loaded."""
    definition = load_definition(run / "definition.py")
    model = build_model(definition)
    path = run / "trajectory.jsonl"
    trajectory = None
    if path.is_file():
        trajectory = read_trajectory(path, len(Examples(definition, "train")))
    return RunModel(run, model, trajectory)


# ---------------------------------------------------------------- one state
def read_optimizer(content: object, path: Path) -> SavedOptimizer:
    """Raises CheckpointError for content that is no state dict of one torch optimizer."""
    mapping = as_mapping(content) or {}
    states = [mapping] if "param_groups" in mapping else list(list_states(mapping, OPTIMIZERS))
    if len(states) != 1:
        raise CheckpointError(
            f"{path} holds {len(states) or 'no'} optimizer states",
            "expected: one, as optimizer.state_dict() gives it",
            "save that of one optimizer with torch.save(optimizer.state_dict(), FILE)",
        )
    try:
        groups = states[0]["param_groups"]
        keys = tuple(tuple(map(int, group["params"])) for group in groups)
        values = {int(key): dict(value) for key, value in states[0]["state"].items()}
        names = tuple(tuple(group.get("param_names") or ()) for group in groups)
        options = tuple(dict(group) for group in groups)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no state dict of a torch optimizer",
            f"found: {type(error).__name__} {error}; expected: state and param_groups by number",
            "save it with torch.save(optimizer.state_dict(), FILE)",
        ) from error
    flat = [key for group in keys for key in group]
    if len(set(flat)) < len(flat) or values.keys() - set(flat):
        raise CheckpointError(
            f"{path} has states that belong to no parameter of its groups, or to two",
            "the file is damaged",
        )
    has_names = all(len(some) == len(group) for some, group in zip(names, keys, strict=True))
    return SavedOptimizer(keys, values, options, names if has_names and flat else None)


def name_optimizer(
    saved: SavedOptimizer, trajectory: Trajectory | None, path: Path, reporter: Reporter
) -> str:
    """torch's lower-case name, by the states and options that the file holds.

    Raises CheckpointError for the states of another optimizer.
    """
    states = {
        state
        for values in saved.states.values()
        for state, value in values.items()
        if value is not None
    }
    options = saved.options[0] if saved.options else {}
    kind = "adam" if "amsgrad" in options else "sgd" if "nesterov" in options else None
    if kind is None or states - STATES[kind]:
        raise CheckpointError(
            f"{path} is the state of an optimizer that influence does not replay",
            f"found: {listed(sorted(states)) or 'no state'}, options {listed(sorted(options))}; "
            "expected: torch's SGD, Adam or AdamW",
            "8-bit, factored and other optimizers have no state that can be converted",
        )
    if kind == "sgd":
        return "sgd"
    decoupled = options.get("decoupled_weight_decay")
    recorded = trajectory.optimizer if trajectory else None
    if decoupled is not None:
        return "adamw" if decoupled else "adam"
    if recorded in ("adam", "adamw"):
        return recorded
    reporter.note(
        f"{path.name} does not say whether it is of Adam or AdamW: AdamW is written, which a "
        "Trainer uses"
    )
    return "adamw"


def name_state(
    saved: SavedOptimizer, mapping: NameMap, optimizer: str, source: Path
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as TrajectoryRecorder writes them: `STATE/PARAMETER NAME`."""
    tensors: dict[str, Tensor] = {}
    numbers = []
    for keys, names in zip(saved.groups, mapping.names, strict=True):
        for key, name in zip(keys, names, strict=True):
            for state, value in saved.states.get(key, {}).items():
                label = f"{state}/{name}"
                if isinstance(value, Tensor):
                    tensors[label] = value
                elif isinstance(value, int | float):
                    dtype = None if isinstance(value, int) else torch.float64
                    tensors[label] = torch.tensor(value, dtype=dtype)
                    numbers.append(label)
    if not tensors:
        raise CheckpointError(
            f"{source} holds no state",
            "found: an optimizer without state, such as SGD without momentum",
            "a replay of it starts at any checkpoint without a saved state",
        )
    metadata = {
        "optimizer": optimizer,
        "numbers": json.dumps(sorted(numbers), separators=(",", ":")),
    }
    return tensors, metadata


# ---------------------------------------------------------------- verification
def verify_states(
    own: RunModel, files: Mapping[int, Path], target: Path, reporter: Reporter
) -> None:
    """Replays from one converted state to the next checkpoint, and notes the distance to it."""
    shapes_only = "names, counts and shapes fit; no recorded step verified the values"
    if own.trajectory is None:
        reporter.note(f"{shapes_only}: {own.folder} has no trajectory.jsonl")
        return
    if target.resolve() != (own.folder / "optimizer").resolve():
        reporter.note(f"{shapes_only}: write to {own.folder / 'optimizer'} to verify them")
        return
    try:
        replayed = replay_to_next(own.folder, set(files))
    except InfluenceError as error:
        reporter.note(f"{shapes_only}: {error.headline}")
        return
    if replayed is None:
        reporter.note(
            f"{shapes_only}: no two checkpoints of the trajectory with a converted state at the "
            f"first are at most {MOST_STEPS} steps apart"
        )
        return
    start, stop, gap = replayed
    steps = f"replaying steps {start} to {stop - 1} from the converted state"
    if gap <= LARGEST_DISTANCE:
        reporter.note(f"{steps} gives checkpoint {stop}: relative distance {gap:.2g}")
    else:
        reporter.note(
            f"{steps} does not give checkpoint {stop}: relative distance {gap:.2g}. Dropout "
            "and other randomness in training also cause this. The order of the parameters is not "
            "verified"
        )


def replay_to_next(run_folder: Path, steps: set[int]) -> tuple[int, int, float] | None:
    """The two steps of the shortest replay from a converted state, and its relative distance."""
    run = open_run(run_folder)
    assert run.trajectory is not None
    pairs = [
        (start, stop)
        for start, stop in itertools.pairwise(run.checkpoints)
        if start.step in steps
        and stop.step <= run.trajectory.steps
        and stop.step - start.step <= MOST_STEPS
    ]
    if not pairs:
        return None
    start, stop = min(pairs, key=lambda pair: pair[1].step - pair[0].step)

    def load_batch(ids: np.ndarray) -> Any:  # Any: the user's batch
        return run.train.batch(ids)

    replay = Replay(run, load_batch)
    replay.start_from(start)
    replay.advance(stop.step)
    return start.step, stop.step, replay.relative_distance(stop)
