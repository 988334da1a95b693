"""The Python API: `open_run`, and what an opened run answers.

Importing this module imports no torch. Opening a run does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from influence_cli.api import argument_values as values
from influence_cli.api.python_names import NoteList, python_messages
from influence_cli.api.score_tables import RankedTable, Scores
from influence_cli.progress import Reporter

if TYPE_CHECKING:
    import os

    import torch

    from influence_cli.api.fill import FilledSplit
    from influence_cli.api.given_rows import TableRow
    from influence_cli.api.id_selection import IdSelection
    from influence_cli.api.opening import Opened, RunFolder
    from influence_cli.api.process_state import ProcessState

    FilePath = str | os.PathLike[str]
    Rows = FilePath | Sequence[TableRow]
    Steps = int | str | Sequence[int]


def open_run(
    run: "FilePath" = ".",
    *,
    definition: "FilePath | None" = None,
    checkpoints: "FilePath | None" = None,
    trajectory: "FilePath | None" = None,
    cache: "FilePath | None" = None,
    verify: bool = False,
    device: "str | torch.device" = "auto",
    batch_size: int | str = "auto",
    precision: str | None = None,
    store: str | None = None,
    project: int | None = None,
    projection: str | None = None,
    seed: int | None = None,
    progress: bool = False,
) -> "InfluenceRun":
    """Open a run folder: run its definition.py, build the model and find the checkpoints.

    The arguments have the names and the defaults of the flags. `cache="none"` stores nothing.
    `progress=True` writes progress and notes to stderr, as the command line does; without it
    nothing is written, and each table has its notes in `notes`.

    Call it again after you edited definition.py, its modules, or the data. The modules beside
    definition.py, and those that its import statements name, are imported anew for each call.

    Raises InfluenceError (influence_cli.errors) with the message of the command line, in which
    arguments have their Python names.
    """
    given = locals()
    with python_messages():
        from influence_cli.api.opening import open_folder
        from influence_cli.api.process_state import ProcessState

        arguments = values.run_arguments(given)
        state = ProcessState(arguments.definition or arguments.run / "definition.py")
        with state.entered():
            folder = open_folder(arguments)
    call = values.describe_call("open_run", {k: v for k, v in given.items() if v != "auto"})
    return InfluenceRun(folder, state, new_reporter(progress), call)


def new_reporter(progress: bool) -> Reporter:
    if not progress:
        return Reporter()
    from influence_cli.output.stderr_reporter import StderrReporter

    return StderrReporter()


class RunCall(NamedTuple):
    """A call in progress. `open`: opens the run for it, with given rows or without."""

    open: "Callable[..., Opened]"
    notes: NoteList
    call: str

    def record(self, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:  # Any: JSON values
        """How a table was made: the call, versions, and what the scores depend on."""
        from influence_cli.output.table_record import list_versions

        return {"command": [self.call], "versions": dict(list_versions()), **make()}


@dataclass(frozen=True, repr=False, eq=False)
class InfluenceRun:
    """An opened run, from `open_run`. Ask it as often as you like, one call at a time.

    Model, definition and data stay in memory. Each call reads the checkpoint files again. The
    ids in `queries` and `train` are a number, a list, a range, a NumPy array, or the text of the
    flag, such as "0,5,10:20" or "@ids.txt"; None: all.
    """

    _folder: "RunFolder"
    _state: "ProcessState"
    _reporter: Reporter
    _call: str

    def __repr__(self) -> str:
        return self._call

    @property
    def path(self) -> Path:
        """The folder of the run."""
        return self._folder.run.folder

    @property
    def steps(self) -> list[int]:
        """The steps of the checkpoints."""
        return [checkpoint.step for checkpoint in self._folder.run.checkpoints]

    def score(
        self,
        method: str = "tracin",
        queries: "IdSelection" = None,
        train: "IdSelection" = None,
        *,
        query: "str | TableRow | Sequence[str | TableRow] | None" = None,
        query_file: "Rows | None" = None,
        candidates: "Rows | None" = None,
        top: int | str = 10,
        by: str | None = None,
        group_by: "FilePath | None" = None,
        aggregate: str | None = None,
        sum_queries: bool = False,
        normalize: bool = False,
        lr: float | None = None,
        lr_weights: str | None = None,
        steps: "Steps | None" = None,
        layers: str | Sequence[str] | None = None,
        shard: str | None = None,
        **options: Any,  # of the method, which has their types
    ) -> Scores:
        """Which training examples lowered each query's loss (proponents), and which raised it?

        `influence score`: the same arguments, the same rows. `query`: texts, or dicts of column ->
        value. `query_file`, `candidates`: a path, or a list of dicts. `top="all"`: every pair,
        which `Scores.matrix` needs. `options`: those of the method, such as curvature="ekfac".
        """
        given = given_arguments(locals())
        with self._request("score", given) as request:
            from influence_cli.api.score import keep_parts, open_scores, plan_scores

            others = {"--layers": bool(layers), "--candidates": candidates is not None}
            others["--project"] = self._folder.arguments.project is not None
            arguments = values.method_arguments(options), values.score_arguments(given)
            limits = values.top_spec(top), values.shard(shard)
            plan = plan_scores(method, *arguments, *limits, others)
            opened = request.open(query, query_file, queries, candidates)
            work = open_scores(opened, plan, queries, train)
            results = [keep_parts(scored) for scored in work.compute()]
            opened.note_unverified("--verify compares all")
            made = request.record(work.made)
        return Scores(work, results, made, request.notes.notes, self._session)

    def self_influence(
        self,
        method: str = "tracin",
        train: "IdSelection" = None,
        *,
        candidates: "Rows | None" = None,
        top: int | str = 10,
        sort: str = "score",
        aggregate: str | None = None,
        lr: float | None = None,
        lr_weights: str | None = None,
        steps: "Steps | None" = None,
        layers: str | Sequence[str] | None = None,
        shard: str | None = None,
        **options: Any,  # as in score
    ) -> RankedTable:
        """Which training examples influence their own prediction most? Wrong labels come first.

        `influence self`: the same arguments, the same rows.
        """
        given = given_arguments(locals())
        with self._request("self_influence", given) as request:
            from influence_cli.api.self_influence import check_sort, open_self, plan_self

            arguments = values.method_arguments(options), values.score_arguments(given)
            limits = values.top_spec(top), values.shard(shard)
            plan = plan_self(method, *arguments, *limits, candidates=candidates is not None)
            key = check_sort(values.text("--sort", sort))
            opened = request.open(candidates=candidates)
            work = open_self(opened, plan, key, train)
            entries = list(work.compute())
            opened.note_unverified("--verify compares all")
            made = request.record(work.made)
        rows = partial(work.rows, entries)
        return RankedTable(work.columns, rows, made, request.notes.notes, self._session, opened)

    def cache(
        self,
        queries: "IdSelection" = None,
        train: "IdSelection" = None,
        *,
        steps: "Steps | None" = None,
        layers: str | Sequence[str] | None = None,
        shard: str | None = None,
    ) -> "list[FilledSplit]":
        """Compute and store the gradients that scoring needs, ahead of it.

        Returns, for queries and for training examples, how many gradients it computed, and how
        many the cache had.
        """
        with self._request("cache", given_arguments(locals())) as request:
            from influence_cli.api.fill import check_stores, fill_cache

            check_stores(self._folder.arguments.cache)
            return fill_cache(request.open(), queries, train, values.shard(shard))

    @contextmanager
    def _session(self) -> Iterator[None]:
        """A block that runs functions of the definition."""
        with python_messages(), self._state.entered(self._folder.settings.tf32):
            yield

    @contextmanager
    def _request(self, name: str, given: Mapping[str, Any]) -> Iterator[RunCall]:  # Any: arguments
        """A block that answers one call."""
        notes = NoteList(self._reporter)

        def open_request(*sources: Any, **rows: Any) -> "Opened":  # Any: given rows
            from influence_cli.api.given_rows import open_given_rows

            steps, layers = values.steps_spec(given.get("steps")), values.globs(given.get("layers"))
            return self._folder.select(notes, steps, layers, open_given_rows(*sources, **rows))

        with self._session():
            for name_of_ids in ("queries", "train"):
                values.check_selection(f"--{name_of_ids}", given.get(name_of_ids))
            call = f"{self._call}.{values.describe_call(name, given)}"
            yield RunCall(open_request, notes, call)


def given_arguments(arguments: Mapping[str, Any]) -> dict[str, Any]:  # Any: arguments
    """The arguments of a method that the caller gave: others than None and False."""
    given = {key: value for key, value in arguments.items() if key not in ("self", "options")}
    given |= arguments.get("options", {})
    return {key: value for key, value in given.items() if value is not None and value is not False}
