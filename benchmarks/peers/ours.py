"""influence_cli, from an opened run to the ranked top 10 of every query, with nothing kept or with gradients kept on disk."""

import runpy
import shutil
from pathlib import Path

import numpy as np
from workloads import write_run

from influence_cli.cli.opening import open_shared
from influence_cli.cli.options import Shared
from influence_cli.methods.request import ScoreRequest
from influence_cli.methods.table import METHODS
from influence_cli.output.ranking import TopRanking

PACKAGE = "influence-cli"


class Kept(TopRanking):
    """The top 10, and every score as well."""

    def __init__(self, width, parts):
        super().__init__(width, parts, 10)
        self.blocks = []

    def add(self, ids, scores, parts=None):
        super().add(ids, scores, parts)
        self.blocks.append(scores)


def tracin(keep, numbers=None):
    def start(work, folder, layers):
        path, cache = folder / "run", folder / "cache"
        if not path.exists():
            if work.name == "gpt2":
                runpy.run_path(str(Path(__file__).with_name("gpt2.py")))["write_run"](
                    path, len(work.xtr)
                )
            else:
                write_run(work.name, path, len(work.xtr))
        shutil.rmtree(cache, ignore_errors=True)
        opened = open_shared(
            Shared(
                run=path,
                cache=str(cache) if keep else "none",
                quiet=True,
                layers=layers or None,
                project=numbers,
            )
        )
        data = opened.run
        question = ScoreRequest(
            opened.checkpoints,
            opened.weights(None, None),
            opened.columns,
            range(len(data.train)),
            range(len(data.query)),
        )

        def run():
            scores = []
            for answer in METHODS["tracin"].score(opened.gradients, question, Kept):
                for query in range(answer.ranking.queries):
                    list(answer.ranking.entries(query))
                scores.append(np.concatenate(answer.ranking.blocks, axis=1))
            return np.concatenate(scores)

        return run, layers

    return start


JOBS = {"none": tracin(False), "disk": tracin(True), "projected": tracin(True, 64)}
