"""From the flags that every command shares to an opened run and its gradients."""

import dataclasses
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from influence_cli.cache.id_blocks import Ids
from influence_cli.cache.identity import Settings
from influence_cli.cli import specs
from influence_cli.cli.given_rows import Given, check_definition
from influence_cli.cli.options import Shared
from influence_cli.cli.stderr_reporter import StderrReporter
from influence_cli.errors import UsageProblem
from influence_cli.extraction.machine import keep_freed_memory
from influence_cli.extraction.predicted_labels import predict_missing_labels
from influence_cli.extraction.source import GradientSource, open_store
from influence_cli.gradients.projection import Projection
from influence_cli.gradients.tf32 import allow_tf32
from influence_cli.methods.request import Groups
from influence_cli.parallel.ranks import Place, Ranks, open_ranks, place_of
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
class Opened:
    """A run, opened as the flags ask: the checkpoints and columns they select, and where gradients
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

    def ids(self, flag: str, spec: str | None, split: str) -> Ids:
        examples = self.run.examples(split)
        return specs.ids(flag, spec, len(examples), examples.source, sys.stdin)

    def query_ids(self, spec: str | None) -> Ids:
        """`--queries`. Queries of the command line without a label get a predicted one."""
        ids = self.ids("--queries", spec, "query")
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


def number_formats(flags: Shared) -> NumberFormats:
    """Raises UsageProblem for unknown names."""
    precision = storage_dtype = None
    if flags.precision:
        name = specs.one_of("--precision", flags.precision, PRECISION_NAMES)
        precision = PRECISIONS["float32" if name == "tf32" else name]
    if flags.store:
        known = PRECISIONS | {"int8": torch.int8}
        storage_dtype = known[specs.one_of("--store", flags.store, STORE_NAMES)]
    return NumberFormats(precision, storage_dtype, flags.precision == "tf32")


def check_cache_flags(flags: Shared, verify: bool) -> None:
    """Raises UsageProblem for flags of the cache beside --cache none."""
    if flags.cache == "none" and flags.store is not None:
        raise UsageProblem(
            "--cache none stores nothing, so --store does not apply", "give one of them"
        )
    if flags.cache == "none" and verify:
        raise UsageProblem(
            "--cache none stores nothing, so --verify has nothing to compare", "give one of them"
        )


def open_shared(
    flags: Shared,
    trajectory: Path | None = None,
    create: bool = True,
    searched: bool = False,
    verify: bool = False,
    given: Given | None = None,
    connected: bool = True,
) -> Opened:
    """Open the run and its cache (not `create`: only if it is there). `given`: rows from the
    command line. Not `connected`: ranks share only what the cache stores.

    Raises UsageProblem for flags that contradict each other or the machine.
    """
    check_cache_flags(flags, verify)
    formats = number_formats(flags)
    projection = specs.projection(flags.project, flags.projection, flags.seed, searched)
    batch_size = specs.batch_size(flags.batch_size)
    place = place_of(os.environ)
    device = find_device(flags.device, place)
    check_tf32(formats.tf32, device)
    keep_freed_memory()
    reporter = Reporter() if flags.quiet or place.rank else StderrReporter()
    run = open_run(
        flags.run, flags.definition, flags.checkpoints, trajectory, formats.precision, device
    )
    check_definition(given or {}, run.definition)
    run = dataclasses.replace(run, given=given or {})
    for note in run.notes:
        reporter.note(note)
    allow_tf32(formats.tf32)  # after definition.py, which may allow it for training
    checkpoints = select_steps(run.checkpoints, flags.steps)
    columns = select_columns(run.columns, flags.layers)
    settings = formats.settings(run, Projection(*projection) if projection else None)
    folder = (
        None
        if flags.cache == "none"
        else Path(flags.cache)
        if flags.cache
        else run.folder / ".influence"
    )
    exists = folder is not None and (create or folder.exists())
    opened = open_store(folder, verify) if folder is not None and exists else None
    ranks = open_ranks(place if connected else Place())
    gradients = GradientSource(
        run, settings, opened, device, batch_size, formats.precision, reporter, ranks
    )
    return Opened(
        run, checkpoints, columns, gradients, folder, reporter, flags.steps, flags.seed or 0
    )


def check_tf32(tf32: bool, device: torch.device) -> None:
    """Raises UsageProblem for TF32 on another device than an NVIDIA GPU that has it."""
    if tf32 and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UsageProblem(
            f"--precision tf32: {device} does not multiply in TF32",
            "expected: --device cuda, and an NVIDIA GPU from compute capability 8.0 (Ampere) on",
            "--precision float32 computes all bits",
        )


def find_device(name: str, place: Place) -> torch.device:
    """`--device`; of several ranks each has the CUDA device of its local number. Raises
    UsageProblem where it is not there.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda" and place.count > 1:
        device_count = torch.cuda.device_count()
        if device_count not in (0, 1) and place.local >= device_count:
            raise UsageProblem(
                f"{place.beside} ranks on this machine, which has {device_count} CUDA devices",
                f"--nproc-per-node {device_count}, one a device",
            )
        # where each rank is shown one device, that is 0
        name = f"cuda:{place.local if device_count > 1 else 0}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageProblem(f"--device {name}: unknown", "expected: auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageProblem(
            f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices that "
            "torch can use",
            f"torch {torch.__version__}; --device auto takes what is there",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageProblem(
            "--device mps: not available on this machine", "--device auto takes what is there"
        )
    return device
