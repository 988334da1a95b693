"""From the arguments that every request shares to an opened run and its gradients."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli.api import specs
from influence_cli.api.devices import check_tf32, find_device
from influence_cli.api.given_rows import Given, check_definition
from influence_cli.api.id_selection import IdSelection, read_ids
from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import Settings
from influence_cli.errors import UsageProblem
from influence_cli.extraction.predicted_labels import predict_missing_labels
from influence_cli.extraction.source import GradientSource, open_store
from influence_cli.gradients.projection import Projection
from influence_cli.methods.request import Groups
from influence_cli.parallel.ranks import Place, Ranks, open_ranks
from influence_cli.parallel.shards import Shard
from influence_cli.progress import Reporter, format_bytes
from influence_cli.run.checkpoints import Checkpoint
from influence_cli.run.learning_rates import CHOICES, Weight, weigh_checkpoints
from influence_cli.run.parameters import PRECISIONS, Column, select_columns
from influence_cli.run.run import Run, open_run, select_steps

PRECISION_NAMES, STORE_NAMES = (
    ("float32", "float64", "bfloat16", "tf32"),
    ("float64", "float32", "float16", "bfloat16", "int8"),
)


@dataclass(frozen=True)
class RunArguments:
    """Where the parts of a run are, and in which numbers its gradients are. Names and values are
    those of the flags.
    """

    run: Path = Path(".")
    definition: Path | None = None
    checkpoints: Path | None = None
    trajectory: Path | None = None
    cache: str | None = None
    verify: bool = False
    device: str = "auto"
    batch_size: str = "auto"
    precision: str | None = None
    store: str | None = None
    project: int | None = None
    projection: str | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Opened:
    """A run, opened for a request: the checkpoints and columns that it selects, and where gradients
    come from.
    """

    run: Run
    checkpoints: tuple[Checkpoint, ...]
    columns: dict[str, Column]
    gradients: GradientSource
    folder: Path | None  # the cache's; None: --cache none
    reporter: Reporter
    steps: str | None = None  # --steps, as given
    seed: int = 0

    @property
    def ranks(self) -> Ranks:
        return self.gradients.ranks

    def ids(self, flag: str, selection: IdSelection, split: str) -> Ids:
        """`--queries` or `--train`: rising ids of a split."""
        examples = self.run.examples(split)
        if selection is None or isinstance(selection, str):
            return specs.ids(flag, selection, len(examples), examples.source, sys.stdin)
        return read_ids(flag, selection, len(examples), examples.source)

    def query_ids(self, selection: IdSelection) -> Ids:
        """`--queries`. Given queries without a label get a predicted one."""
        ids = self.ids("--queries", selection, "query")
        predict_missing_labels(self.gradients, self.checkpoints[-1], ids)
        return ids

    def shard_ids(self, ids: Ids, shard: Shard | None) -> Ids:
        """The training ids of the shard. A note names them."""
        if shard is None:
            return ids
        shard_ids = shard.of(ids)
        where = f"{shard_ids[0]:,} to {shard_ids[-1]:,}" if len(shard_ids) else "none"
        self.reporter.note(
            f"{shard}: {len(shard_ids):,} of {len(ids):,} training examples, {where}"
        )
        return shard_ids

    def weights(self, lr: float | None, lr_weights: str | None) -> tuple[Weight, ...]:
        """The learning-rate weights of the selected checkpoints. Weights of zero are named on
        stderr.
        """
        if lr is not None and lr_weights is not None:
            raise UsageProblem(
                "--lr and --lr-weights both set the weights of checkpoints", "give one of them"
            )
        if lr is not None and not 0 < lr < float("inf"):
            raise UsageProblem(f"--lr {lr}", "expected: a number above 0")
        choice = specs.one_of("--lr-weights", lr_weights or "point", CHOICES)
        needs_trajectory = lr is None and choice != "none"
        trajectory = self.run.trajectory if needs_trajectory else None
        for note in trajectory.notes if trajectory else ():
            self.reporter.note(note)
        weights = tuple(
            weigh_checkpoints(self.checkpoints, trajectory, choice, lr, self.run.checkpoints)
        )
        zero = [str(weight.step) for weight in weights if weight.is_zero]
        if zero:
            self.reporter.note(
                f"the learning rate is 0 at step {', '.join(zero)}: that checkpoint adds "
                "nothing to the scores"
            )
        return weights

    def groups(self, group_by: str, train: Ids) -> Groups:
        """`--group-by`: groups in the order of their names, over the training examples asked
        for.
        """
        examples = self.run.train
        if group_by == "label":
            if not self.run.definition.has("label"):
                raise UsageProblem(
                    "--group-by label: definition.py has no label(example)",
                    "--group-by FILE takes a name per line",
                )
            with self.reporter.progress("labels", len(train)) as advance:
                names = {}
                for index in train:
                    names[int(index)] = examples.label(index)
                    advance(1)
        else:
            lines = specs.group_file(Path(group_by), len(examples))
            names = {int(index): lines[index] for index in train}
        distinct = sorted(set(names.values()))
        number = {name: k for k, name in enumerate(distinct)}
        of = np.full(len(examples), -1)
        of[list(names)] = [number[name] for name in names.values()]
        return Groups(of, distinct)

    def note_unverified(self, remedy: str = "influence check compares all") -> None:
        """Say how much was read from the cache and not compared with its checksums."""
        cache = self.gradients.cache
        if cache and cache.store.verification.skipped:
            self.reporter.note(
                f"{format_bytes(cache.store.verification.skipped)} of stored gradients were not "
                f"compared with their checksums; {remedy}"
            )

    @property
    def has_ids(self) -> bool:
        """Whether tables show the user's own ids."""
        return self.run.definition.has("id")

    def describe(self, split: str, index: int) -> tuple[str, str, str]:
        """Label, text and the user's own id of an example."""
        examples = self.run.examples(split)
        own_id = examples.own_id(index) if self.has_ids else ""
        return examples.label(index), examples.text(index), own_id


@dataclass(frozen=True)
class NumberFormats:
    """`--precision` and `--store`; None: not given. `tf32`: float32 in TF32."""

    precision: torch.dtype | None
    storage_dtype: torch.dtype | None
    tf32: bool

    def settings(self, run: Run, projection: Projection | None) -> Settings:
        """Without flags, the run's own precision: the widest of its parameters."""
        dtypes = {column.dtype for column in run.columns.values()}
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        return Settings(
            self.precision or widest,
            self.storage_dtype or self.precision or widest,
            self.precision is None and len(dtypes) > 1,
            projection,
            self.tf32,
        )


def number_formats(arguments: RunArguments) -> NumberFormats:
    """Raises UsageProblem for unknown names."""
    precision = storage_dtype = None
    if arguments.precision:
        name = specs.one_of("--precision", arguments.precision, PRECISION_NAMES)
        precision = PRECISIONS["float32" if name == "tf32" else name]
    if arguments.store:
        known = PRECISIONS | {"int8": torch.int8}
        storage_dtype = known[specs.one_of("--store", arguments.store, STORE_NAMES)]
    return NumberFormats(precision, storage_dtype, arguments.precision == "tf32")


def check_cache_arguments(arguments: RunArguments) -> None:
    """Raises UsageProblem for arguments of the cache beside --cache none."""
    if arguments.cache == "none" and arguments.store is not None:
        raise UsageProblem(
            "--cache none stores nothing, so --store does not apply", "give one of them"
        )
    if arguments.cache == "none" and arguments.verify:
        raise UsageProblem(
            "--cache none stores nothing, so --verify has nothing to compare", "give one of them"
        )


@dataclass(frozen=True)
class RunFolder:
    """An opened run folder, from which requests select. Model and data are loaded once."""

    arguments: RunArguments
    run: Run
    settings: Settings
    device: torch.device
    batch_size: int | None  # None: measure one
    cast: torch.dtype | None  # of floating batch tensors
    place: Place | None = None  # in a torchrun job
    create: bool = True  # whether a cache may be created

    @property
    def cache(self) -> Path | None:
        """The cache folder; None: --cache none."""
        given = self.arguments.cache
        return None if given == "none" else Path(given) if given else self.run.folder / ".influence"

    def select(
        self,
        reporter: Reporter,
        steps: str | None = None,
        layers: Sequence[str] | None = None,
        given: Given | None = None,
    ) -> Opened:
        """The run for one request. `given`: rows that replace its data. Reads the cache and the
        weights from the disk again: files may have changed.
        """
        check_definition(given or {}, self.run.definition)
        run = dataclasses.replace(self.run, given=given or {})
        for note in run.notes:
            reporter.note(note)
        checkpoints = select_steps(run.checkpoints, steps)
        columns = select_columns(run.columns, list(layers) if layers else None)
        folder = self.cache
        exists = folder is not None and (self.create or folder.exists())
        store = open_store(folder, self.arguments.verify) if folder is not None and exists else None
        run.model.forget()
        gradients = GradientSource(
            run, self.settings, store, self.device, self.batch_size, self.cast, reporter,
            open_ranks(self.place or Place()),
        )  # fmt: skip
        seed = self.arguments.seed or 0
        return Opened(run, checkpoints, columns, gradients, folder, reporter, steps, seed)


def open_folder(
    arguments: RunArguments, place: Place | None = None, create: bool = True, searched: bool = False
) -> RunFolder:
    """Open the run and load its model. `place`: in a torchrun job. Not `create`: use a cache only
    if it exists. `searched`: the number of --project is searched.

    Raises UsageProblem for arguments that contradict each other or the machine.
    """
    check_cache_arguments(arguments)
    formats = number_formats(arguments)
    projection = specs.projection(arguments.project, arguments.projection, arguments.seed, searched)
    batch_size = specs.batch_size(arguments.batch_size)
    device = find_device(arguments.device, place or Place())
    check_tf32(formats.tf32, device)
    run = open_run(
        arguments.run, arguments.definition, arguments.checkpoints, arguments.trajectory,
        formats.precision, device,
    )  # fmt: skip
    settings = formats.settings(run, Projection(*projection) if projection else None)
    return RunFolder(arguments, run, settings, device, batch_size, formats.precision, place, create)
