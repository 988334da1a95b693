"""Plans a reverse pass: which steps, in which segments, for which parameters.

It refuses a trajectory or flags that the reverse pass can't follow.
"""

from influence_cli.errors import TrajectoryError, UsageProblem, listed
from influence_cli.methods.reverse.segments import ReversePlan, Segment
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.optimizers import OPTIMIZERS, read_options
from influence_cli.run.parameters import Column
from influence_cli.run.run import Run
from influence_cli.run.trajectory import Group, Trajectory, missing_trajectory


def build_plan(
    run: Run,
    checkpoints: tuple[Checkpoint, ...],
    columns: dict[str, Column],
    at: int | None = None,
    replay: bool = False,
    method: str = "dve",
) -> ReversePlan:
    """The plan of a reverse pass from the checkpoint of step `at`; None: from the last one.

    `replay`: each step uses gradients at its own parameters, so the plan leaves out the steps
    before the first checkpoint.

    Raises TrajectoryError: no trajectory, one that ends too early, an optimizer without an adjoint
    here. Raises UsageProblem: no checkpoint or no step to start from, no trained parameter.
    """
    trajectory = run.trajectory
    if trajectory is None:
        raise missing_trajectory(method)
    check_optimizer(trajectory, replay, method)
    checkpoints = select_checkpoints(checkpoints, at)
    end = checkpoints[-1]
    check_end(trajectory, end)
    segments = cut_segments(checkpoints, replay)
    trained = select_trained(trajectory, columns)
    notes = [
        *trajectory.notes,
        *notes_on_steps(trajectory, segments, end, at, replay),
        *notes_on_columns(run, trajectory, columns, trained, end),
    ]
    return ReversePlan(trajectory, segments, end, trained, tuple(notes))


def select_checkpoints(
    checkpoints: tuple[Checkpoint, ...], at: int | None
) -> tuple[Checkpoint, ...]:
    """The checkpoints up to that of step `at`."""
    if at is None:
        return checkpoints
    steps = [checkpoint.step for checkpoint in checkpoints]
    if at not in steps:
        raise UsageProblem(
            f"--at {at}: the run has no checkpoint of step {at}",
            f"it has checkpoints of the steps {listed(steps, 20)}",
        )
    return tuple(checkpoint for checkpoint in checkpoints if checkpoint.step <= at)


def check_end(trajectory: Trajectory, end: Checkpoint) -> None:
    """Raise where the trajectory has no steps up to the checkpoint to explain."""
    if end.step > trajectory.steps:
        raise TrajectoryError(
            f"{trajectory.path.name} ends before {end.name}",
            f"it has the steps 0 to {trajectory.steps - 1:,}, so the last checkpoint that it can "
            f"explain is of step {trajectory.steps:,}",
            "choose an earlier checkpoint with --at STEP or --steps, or the trajectory of this run "
            "with --trajectory FILE",
        )
    if not end.step:
        raise UsageProblem(
            f"{end.name} is from before the first step: training has not changed it yet",
            "choose a later checkpoint with --at STEP or --steps",
        )


def cut_segments(checkpoints: tuple[Checkpoint, ...], replay: bool) -> tuple[Segment, ...]:
    """Segments up to the last checkpoint. Without replay the first one starts at step 0."""
    end = checkpoints[-1]
    starts = [*checkpoints[:-1]] or [end]
    first = starts[0].step if replay else 0
    if replay and first == end.step:
        raise UsageProblem(
            f"--replay re-runs training from an earlier checkpoint, and {end.name} is the only one",
            "select an earlier checkpoint, too, with --steps",
        )
    edges = [first, *(checkpoint.step for checkpoint in starts[1:]), end.step]
    return tuple(
        Segment(checkpoint, start, stop)
        for checkpoint, start, stop in zip(starts, edges[:-1], edges[1:], strict=True)
    )


def select_trained(trajectory: Trajectory, columns: dict[str, Column]) -> dict[str, Column]:
    """The columns that are in one of the trajectory's parameter groups."""
    trained = {
        name: column
        for name, column in columns.items()
        if trajectory.group_of(column.names) is not None
    }
    if not trained:
        raise UsageProblem(
            "none of the selected parameters was trained, by the trajectory's groups",
            f"selected: {listed(columns)}",
        )
    return trained


def notes_on_steps(
    trajectory: Trajectory,
    segments: tuple[Segment, ...],
    end: Checkpoint,
    at: int | None,
    replay: bool,
) -> list[str]:
    """Notes on the steps outside of the checkpoints."""
    notes = []
    if end.step < trajectory.steps and at is None:
        notes.append(
            f"steps {end.step:,} to {trajectory.steps - 1:,} come after the last checkpoint and "
            "are left out"
        )
    first = segments[0].checkpoint
    if first.step:
        treatment = (
            "are left out: a replay starts at a checkpoint"
            if replay
            else f"have the gradients of {first.name}"
        )
        notes.append(
            f"steps 0 to {min(first.step, end.step) - 1:,} come before the first checkpoint "
            f"and {treatment}"
        )
    return notes


def notes_on_columns(
    run: Run,
    trajectory: Trajectory,
    columns: dict[str, Column],
    trained: dict[str, Column],
    end: Checkpoint,
) -> list[str]:
    """Notes on parameters that were never trained, and on clipping over selected parameters."""
    notes = []
    if len(trained) < len(columns):
        untrained = [name for name in columns if name not in trained]
        notes.append(f"never trained, by the trajectory's groups: {listed(untrained)}")
    if len(columns) < len(run.columns) and any(
        line.clip != 1 for line in trajectory.lines[: end.step]
    ):
        notes.append(
            "training clipped gradients by their norm over all parameters; this score uses the "
            "norm over the selected ones"
        )
    return notes


def check_optimizer(trajectory: Trajectory, replay: bool, method: str) -> None:
    """Raise TrajectoryError where this package has no adjoint for the recorded optimizer."""
    if trajectory.optimizer is None:
        raise TrajectoryError(
            f"{trajectory.path.name}: the header names no optimizer",
            'expected: "optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0}, with '
            "torch's names",
        )
    if trajectory.optimizer not in OPTIMIZERS:
        raise TrajectoryError(
            f"{trajectory.path.name}: {method} has no adjoint for steps of {trajectory.optimizer}",
            "expected: sgd (with momentum, nesterov, weight_decay), adam or adamw",
            "--method tracin needs no adjoint",
        )
    if trajectory.optimizer != "sgd" and not replay:
        raise TrajectoryError(
            f"{method} needs the moment estimates of {trajectory.optimizer} at every step, and "
            "checkpoints do not store them",
            "--replay recovers them by re-running the recorded steps",
            "--method tracin needs no moment estimates",
        )
    for number, group in enumerate(trajectory.groups):
        check_group_options(trajectory, group)
        read_options(trajectory, number)


def check_group_options(trajectory: Trajectory, group: Group) -> None:
    """Raise TrajectoryError for options without an adjoint, or with a value that is no number."""
    for name in ("dampening", "maximize", "amsgrad"):
        if group.options.get(name):
            raise TrajectoryError(
                f"{trajectory.path.name}: {trajectory.optimizer} with {name} = "
                f"{group.options[name]!r} has no adjoint here",
                "--method tracin needs no adjoint",
            )
    for name in ("momentum", "weight_decay"):
        value = group.options.get(name, 0)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 <= value < float("inf"):
            raise TrajectoryError(
                f"{trajectory.path.name}: {name} is {value!r}", "expected: a number from 0"
            )
