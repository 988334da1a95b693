"""Opens a run: definition, checkpoints and trajectory, checked against each other."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from influence_cli.errors import UsageProblem, listed, shown
from influence_cli.run import parameters
from influence_cli.run.checkpoint_loading import (
    add_base,
    check_fits_model,
    describe_widening,
)
from influence_cli.run.checkpoints import Checkpoint, find_checkpoints
from influence_cli.run.datasets import Examples
from influence_cli.run.definition import Definition, load_definition
from influence_cli.run.given_rows import GivenRows
from influence_cli.run.loaded_model import LoadedModel
from influence_cli.run.parameters import Column
from influence_cli.run.trajectory import Trajectory
from influence_cli.run.trajectory_reader import read_trajectory

STEPS = re.compile("([0-9]{1,4000})|([0-9]{0,4000}):([0-9]{0,4000})")  # of --steps: N or N:N


@dataclass(frozen=True)
class Run:
    """An opened run. Builds its datasets at their first use. `given`: rows from the command line
    that replace train_data() or query_data(). `datasets`: those of the definition, by split, which
    copies of the run share.
    """

    folder: Path
    definition: Definition
    model: LoadedModel
    columns: dict[str, Column]
    checkpoints: tuple[Checkpoint, ...]
    trajectory_path: Path | None
    given: Mapping[str, GivenRows] = field(default_factory=dict)  # by split
    changed: Mapping[int, Any] = field(default_factory=dict)  # examples that replace others, by id
    notes: tuple[str, ...] = ()  # for the user, once
    datasets: dict[str, Examples] = field(default_factory=dict)

    @cached_property
    def embeddings(self) -> dict[str, Column]:
        """The outputs of the embedding modules, as columns."""
        return parameters.list_embeddings(self.model.module)

    @cached_property
    def token_embedding(self) -> str | None:
        """The name of the embedding that a model of transformers gets token ids through; None
        where the model does not tell.
        """
        module: Any = self.model.module
        if not hasattr(module, "get_input_embeddings"):
            return None
        embedding = module.get_input_embeddings()
        names = [name for name, inner in module.named_modules() if inner is embedding]
        return next((name for name in names if f"{name}()" in self.embeddings), None)

    def has(self, column: str) -> bool:
        return column in self.columns or column in self.embeddings

    @cached_property
    def train(self) -> Examples:
        if "train" in self.given or self.changed:
            return Examples(self.definition, "train", self.given.get("train"), self.changed)
        return self.open_dataset("train")

    @cached_property
    def query(self) -> Examples:
        if "query" in self.given:
            return Examples(self.definition, "query", self.given["query"])
        return self.open_dataset("query")

    def open_dataset(self, split: str) -> Examples:
        """What the definition's train_data() or query_data() returns, opened once."""
        if split not in self.datasets:
            self.datasets[split] = Examples(self.definition, split)
        return self.datasets[split]

    def examples(self, split: str) -> Examples:
        return self.train if split == "train" else self.query

    @cached_property
    def trajectory(self) -> Trajectory | None:
        if self.trajectory_path is None:
            return None
        trained = self.open_dataset("train") if "train" in self.given else self.train
        return read_trajectory(self.trajectory_path, len(trained))


def check_paths(
    folder: Path, definition: Path | None, checkpoints: Path | None, trajectory: Path | None
) -> None:
    """Raises UsageProblem for a file or folder that does not exist."""
    if not folder.is_dir():
        raise UsageProblem(
            f"no run at {folder}",
            "expected: a folder with definition.py and checkpoints/",
            "`influence init DIR` starts one",
        )
    if definition is not None and not definition.is_file():
        raise UsageProblem(
            f"--definition {definition}: no such file",
            "expected: a Python file like RUN/definition.py",
        )
    if checkpoints is not None and not checkpoints.is_dir():
        raise UsageProblem(
            f"--checkpoints {checkpoints}: no such folder",
            "expected: a folder of checkpoints like RUN/checkpoints",
        )
    if trajectory is not None and not trajectory.is_file():
        raise UsageProblem(
            f"--trajectory {trajectory}: no such file", "expected: a file like RUN/trajectory.jsonl"
        )


def open_run(
    folder: Path,
    definition: Path | None = None,
    checkpoints: Path | None = None,
    trajectory: Path | None = None,
    precision: torch.dtype | None = None,
    device: torch.device | None = None,
) -> Run:
    """Opens a run folder: loads the definition, builds the model, and checks the header of every
    checkpoint against it.

    `precision`: of the model and of floating-point batch tensors; None: the model's own.
    Raises InfluenceError kinds for whatever does not fit.
    """
    check_paths(folder, definition, checkpoints, trajectory)
    loaded = load_definition(definition or folder / "definition.py")
    saved = find_checkpoints(folder, checkpoints)
    model = parameters.build_model(loaded)
    saved = add_base(check_fits_model(saved, model, cast=precision is not None), model)
    notes = [describe_widening(saved, model)] if precision is None else []
    if saved[0].path == folder:
        notes.append(
            f"{folder} holds one saved model and no checkpoint-N; influence reads it as step "
            f"{saved[0].step}"
        )
    model = parameters.cast_model(model, precision, device or torch.device("cpu"))
    default = folder / "trajectory.jsonl"
    return Run(
        folder,
        loaded,
        LoadedModel(model, saved),
        parameters.list_columns(model),
        tuple(saved),
        trajectory or (default if default.is_file() else None),
        notes=tuple(filter(None, notes)),
    )


def select_steps(checkpoints: tuple[Checkpoint, ...], spec: str | None) -> tuple[Checkpoint, ...]:
    """`--steps`: checkpoints by step: `100,200`, `100:`, `:500` (half-open).

    Raises UsageProblem for a step without a checkpoint.
    """
    if spec is None:
        return checkpoints
    kept: set[int] = set()
    steps = [checkpoint.step for checkpoint in checkpoints]
    for part in spec.split(","):
        match = STEPS.fullmatch(part.strip())
        if match is None:
            raise UsageProblem(
                f"--steps {shown(spec)} can't be read at {shown(part)}",
                "expected: steps like 100,200 or a half-open range like 100:500",
            )
        if match[1]:
            start = int(match[1])
            stop = start + 1
        else:
            start, stop = int(match[2] or 0), int(match[3]) if match[3] else max(steps) + 1
        chosen = {step for step in steps if start <= step < stop}
        if not chosen:
            raise UsageProblem(
                f"--steps {part.strip()}: no checkpoint has such a step",
                f"found: checkpoints of the steps {listed(steps, 20)}",
            )
        kept |= chosen
    return tuple(checkpoint for checkpoint in checkpoints if checkpoint.step in kept)
