"""The tables that `InfluenceRun` returns."""

import os
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from influence_cli.errors import InfluenceError, UsageProblem

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from influence_cli.api.opening import Opened
    from influence_cli.api.score import ScoreWork
    from influence_cli.methods.request import ScoredQueries
    from influence_cli.output.columns import Row
    from influence_cli.progress import Reporter
    from influence_cli.report.write import TablePage

Session = Callable[[], AbstractContextManager[None]]  # in which the definition's functions run


class RankedTable:
    """A table: of `InfluenceRun.self_influence`, or the base of `Scores`.

    `columns`: the names of the columns. `notes`: what a user should know of this call; the command
    line writes them to stderr. `made`: how the table was made, as FILE.meta.json has it.
    """

    def __init__(
        self,
        columns: tuple[str, ...],
        read_rows: "Callable[[], Iterator[Row]]",
        made: dict[str, Any],  # Any: JSON values
        notes: list[str],
        session: Session,
        opened: "Opened",
    ) -> None:
        self.columns, self.made, self.notes = columns, made, notes
        self._read_rows, self._session, self._opened = read_rows, session, opened

    def __repr__(self) -> str:
        return f"<{self.made['command'][0]}: columns {', '.join(self.columns)}>"

    def rows(self) -> list[Any]:  # Any: a named tuple of the columns
        """The rows, as named tuples: `row.train`, `row.score`, `row.query_token`."""
        names = [name.replace("-", "_") for name in self.columns]
        row = namedtuple("Row", names)  # type: ignore[misc]  # names of this table
        with self._session():
            return [row(*cells) for cells in self._read_rows()]

    def to_pandas(self) -> "pd.DataFrame":
        """The rows as a DataFrame. Raises InfluenceError without pandas."""
        try:
            import pandas as pd
        except ImportError as error:
            raise InfluenceError("to_pandas() needs pandas", "pip install pandas") from error
        return pd.DataFrame(self.rows(), columns=list(self.columns))

    def write(
        self, path: str | os.PathLike[str], format: str | None = None, safe_cells: bool = False
    ) -> None:
        """Write what the command line writes with -o: the table, and how it was made.

        `format`: table, csv, tsv, jsonl or parquet; None: by the name's ending, else csv. The file
        appears only when it is complete.
        """
        file = Path(path).absolute()
        with self._session():
            from influence_cli.output.tables import TableWriter

            sink = TableWriter.open(format, file, safe_cells=safe_cells)
            sink.write(self._read_rows(), self.columns, lambda: self.made)

    def report(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML page of the table, with the pictures of image(example): the page of
        `influence report`. It needs the extra report.
        """
        file = Path(path).absolute()
        with self._session():
            from influence_cli.output.tables import check_file_name

            check_file_name(file)
            if self.made.get("shard") is not None:
                raise UsageProblem(
                    "report() needs the scores of all examples, and shard computes a part",
                    "merge the parts, then: influence report scores.csv -o page.html",
                )
            page = open_page(file, self._opened, self.made.get("top"), self._opened.reporter)
            page.write(self._read_rows(), self.columns, self.made)


class Scores(RankedTable):
    """Ranked scores of training examples, from `InfluenceRun.score`.

    Sorted by query: proponents by falling score, then opponents by rising score.
    """

    def __init__(
        self,
        work: "ScoreWork",
        results: "list[ScoredQueries]",
        made: dict[str, Any],  # Any: JSON values
        notes: list[str],
        session: Session,
    ) -> None:
        super().__init__(
            work.columns, lambda: work.rows(results), made, notes, session, work.opened
        )
        self._work, self._results = work, results

    @cached_property
    def query_ids(self) -> "np.ndarray":
        """(Q,) ids of the queries; `all` with sum_queries."""
        import numpy as np

        summed = self._work.plan.scored.sum_queries
        return np.array(["all"]) if summed else np.asarray(self._work.queries, np.int64)

    @cached_property
    def train_ids(self) -> "np.ndarray":
        """(N,) ids of the training examples; names of groups with group_by."""
        import numpy as np

        groups = self._work.groups
        return np.array(groups) if groups else np.asarray(self._work.train, np.int64)

    def matrix(self) -> "np.ndarray":
        """(Q, N) float64: the score of each pair, in the order of `query_ids` and `train_ids`.

        Raises UsageProblem for the scores of a top, which are not all.
        """
        import numpy as np

        if (top := self._work.plan.top) is not None:
            raise UsageProblem(
                f"matrix() needs the scores of all pairs, and top={top} keeps some of them",
                "expected: run.score(..., top='all')",
            )
        scores_QN = np.empty((len(self.query_ids), len(self.train_ids)))
        rankings = (
            scored.ranking.entries(position)
            for scored in self._results
            for position in range(scored.ranking.queries)
        )
        for scores_N, ranking in zip(scores_QN, rankings, strict=len(self.train_ids) > 0):
            entries = list(ranking)
            ids = np.array([entry.train for entry in entries], np.int64)
            at = ids if self._work.groups else np.searchsorted(self.train_ids, ids)
            scores_N[at] = [entry.score for entry in entries]
        return scores_QN


def open_page(path: Path, opened: "Opened", top: int | None, reporter: "Reporter") -> "TablePage":
    """The page of a table of this run. `top`: of the table. Raises UsageProblem where a library is
    missing.
    """
    from influence_cli.report.page import require_jinja
    from influence_cli.report.pictures import require_pillow
    from influence_cli.report.run_examples import PictureSource
    from influence_cli.report.write import TablePage

    run = opened.run
    source = PictureSource(run.definition, run.examples, run.folder.resolve().name)
    require_jinja()
    if source.has_pictures:
        require_pillow(run.definition.path.name)
    return TablePage(path, source, reporter, top)
