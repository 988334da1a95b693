"""Trains the run without some of its examples, and measures each query at the end of it.

A training is a replay of the recorded steps without those examples, in the same order, or a call of
the definition's train(indices, seed). Finished trainings are stored.

Shape letters: N training examples, R sets of omitted examples, S seeds, Q queries.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, Protocol

import numpy as np
from torch import nn

from influence_cli.errors import DefinitionError, UsageProblem
from influence_cli.evaluate.declaration import EvaluationRequest
from influence_cli.evaluate.result_log import Record, ResultLog
from influence_cli.evaluate.retraining import (
    check_trajectory,
    damaged_record,
    find_baseline,
    log_path,
    note_replay,
    open_replay,
    query_values,
    replay_baseline,
)
from influence_cli.extraction.source import GradientSource
from influence_cli.progress import Advance
from influence_cli.run.replay import OmittedExamples

Key = tuple[str, int]  # of a training: the digest of the omitted ids, and the seed


class SubsetTrainer(Protocol):
    """One way of training without some examples. `steps`: of one training, for progress."""

    steps: int

    def measure_baseline(self, advance: Advance) -> Record:
        """Two complete trainings: `values` is m of each query, `again` that of the second."""

    def train(
        self, omitted: np.ndarray, seed: int, baseline: Record, advance: Advance
    ) -> np.ndarray:
        """(Q,) m of each query after a training without these examples. `omitted`: rising ids."""

    def note_limits(self, baseline: Record) -> None:
        """Notes that say how well a training reproduces the run."""


class ReplayTrainer:
    """Replays the recorded steps from the first checkpoint on. A step without examples is a step of
    the optimizer and of its schedule, too.
    """

    def __init__(
        self, source: GradientSource, request: EvaluationRequest, protocol: str, renormalize: bool
    ) -> None:
        """Raises TrajectoryError where the recorded training can't be replayed."""
        self.source, self.request, self.renormalize = source, request, renormalize
        self.protocol = protocol
        self.start, self.end = source.run.checkpoints[0], request.checkpoints[-1]
        trajectory = check_trajectory(source.run, self.start, self.end, protocol)
        self.replay = open_replay(source)
        self.replay.start_from(self.start)
        for note in trajectory.notes:
            source.reporter.note(note)
        self.initial = self.replay.save_state()
        self.steps = self.end.step - self.start.step

    def measure_baseline(self, advance: Advance) -> Record:
        return replay_baseline(self.source, self.replay, self.request, advance)

    def train(
        self, omitted: np.ndarray, seed: int, baseline: Record, advance: Advance
    ) -> np.ndarray:
        self.replay.restore(self.initial)
        drop = OmittedExamples(omitted, self.renormalize)
        self.replay.advance(self.end.step, drop, baseline["max_norm"], report_progress=advance)
        return query_values(self.source, self.request.queries)

    def note_limits(self, baseline: Record) -> None:
        note_replay(self.source.reporter, baseline, self.end, self.protocol)


class DefinitionTrainer:
    """Calls the definition's train(indices, seed) with the ids of the examples that are left."""

    steps = 1

    def __init__(self, source: GradientSource, request: EvaluationRequest) -> None:
        self.source, self.request = source, request
        self.count = len(source.run.train)

    def measure_baseline(self, advance: Advance) -> Record:
        started = perf_counter()
        nothing = np.empty(0, np.int64)
        values, again = (
            self.train(nothing, seed, {}, advance).tolist()
            for seed in (self.request.seed, self.request.seed + 1)
        )
        return {"values": values, "again": again, "seconds": perf_counter() - started}

    def train(
        self, omitted: np.ndarray, seed: int, baseline: Record, advance: Advance
    ) -> np.ndarray:
        run = self.source.run
        indices = np.setdiff1d(np.arange(self.count), omitted).tolist()
        module: Any = run.definition.call("train", indices, seed)  # the user's
        if not isinstance(module, nn.Module):
            raise DefinitionError(
                f"train() in {run.definition.path.name} returned a {type(module).__name__}",
                "expected: the trained model, a torch.nn.Module",
            )
        module = module.to(self.source.device, self.source.extractor.batches.cast).eval()
        values_Q = query_values(self.source, self.request.queries, module)
        advance(1)
        return values_Q

    def note_limits(self, baseline: Record) -> None:
        pass


class SubsetTrainings:
    """Trainings without some examples, each of them once: finished ones come from the log."""

    def __init__(
        self,
        source: GradientSource,
        request: EvaluationRequest,
        protocol: str,
        renormalize: bool,
        retrainings: int,
    ) -> None:
        """`retrainings`: seeds of each training. Raises UsageProblem where a replay can't have
        several.
        """
        self.source, has_train = source, source.run.definition.has("train")
        if retrainings > 1 and not has_train:
            raise UsageProblem(
                f"--retrainings {retrainings}: a replay has the recorded order, so each one ends "
                "with the same weights",
                "expected: --retrainings 1",
                "define train(indices, seed) in definition.py to train with several seeds",
            )
        self.trainer: SubsetTrainer = (
            DefinitionTrainer(source, request)
            if has_train
            else ReplayTrainer(source, request, protocol, renormalize)
        )
        if has_train and renormalize:
            source.reporter.note("train() decides its own weights; --renormalize changes scores")
        first = request.seed if has_train else 0
        self.seeds = range(first, first + retrainings)
        kind = ["train", first] if has_train else ["replay", renormalize]
        parts = [*kind, source.run.train.digest_of_all]
        self.log = ResultLog(log_path(source, request, "subsets", parts))

    def measure(self, omissions: Sequence[np.ndarray], what: str) -> list[Record]:
        """The record of each training: for each set of omitted examples those of all seeds.

        `omissions`: rising ids each. `what`: a noun for progress, such as "subset".
        """
        keys = [(key_of(omitted), seed) for omitted in omissions for seed in self.seeds]
        missing = dict.fromkeys(key for key in keys if key not in self._finished())
        sets = dict(zip(map(key_of, omissions), omissions, strict=True))
        baseline = find_baseline(self.log)
        count = len(missing) + (0 if baseline else 2)
        with self.source.reporter.progress("retraining", count * self.trainer.steps) as advance:
            if baseline is None:
                self.log.add(self.trainer.measure_baseline(advance))
            self._train_missing(list(missing), sets, partial(advance, where=what))
        self.trainer.note_limits(self.baseline)
        finished = self._finished()
        return [finished[key] for key in keys]

    def _train_missing(
        self, missing: list[Key], sets: Mapping[str, np.ndarray], advance: Advance
    ) -> None:
        """Train and store. Where another process does the same, they divide the work: each one goes
        on at a random place, and leaves out what the other has stored since.
        """
        is_alone = True
        while missing:
            key, seed = missing[0] if is_alone else random.choice(missing)
            started = perf_counter()
            values_Q = self.trainer.train(sets[key], seed, self.baseline, advance)
            seconds = perf_counter() - started
            values = values_Q.tolist()
            record = {"without": key, "seed": seed, "m": values, "seconds": seconds}
            is_new = self.log.add(record)
            finished = self._finished()  # the log has read what other processes added
            rest = [other for other in missing if other not in finished]
            is_alone = is_alone and is_new and len(rest) == len(missing) - 1
            missing = rest

    def _finished(self) -> dict[Key, Record]:
        """The stored trainings. Raises CacheError for a damaged record."""
        try:
            return {
                (record["without"], record["seed"]): record
                for record in self.log.records
                if "m" in record
            }
        except (KeyError, TypeError) as error:
            raise damaged_record(error) from error

    @property
    def baseline(self) -> Record:
        """The record of the two complete trainings."""
        baseline = find_baseline(self.log)
        assert baseline is not None
        return baseline


def key_of(omitted: np.ndarray) -> str:
    """A digest of the ids of the omitted examples."""
    return hashlib.sha256(omitted.astype("<i8").tobytes()).hexdigest()[:24]


def values_of(records: Sequence[Record], seeds: int) -> np.ndarray:
    """(R, S, Q) m of each query."""
    values = np.array([record["m"] for record in records])
    return values.reshape(len(records) // seeds, seeds, -1)
