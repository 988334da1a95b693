"""dattri: TracIn on all parameters, with its default projection to 512 numbers and without."""

import torch
from dattri.algorithm.tracin import TracInAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, TensorDataset

PACKAGE = "dattri"


def tracin(project):
    def start(work, folder, _):
        def loss(params, example):
            x, y = example
            return work.loss_each(
                torch.func.functional_call(work.model, params, (x[None],)), y[None]
            )[0]

        def run():
            task = AttributionTask(loss, work.model, list(work.ckpts))
            method = TracInAttributor(task, torch.tensor(work.lrs), normalized_grad=False)
            if not project:
                method.projector_kwargs = None  # the constructor takes None for its default
            train, queries = (
                DataLoader(TensorDataset(x, y), work.batch)
                for x, y in ((work.xtr, work.ytr), (work.xte, work.yte))
            )
            return method.attribute(train, queries).T

        return run, []

    return start


JOBS = {"exact": tracin(False), "projected": tracin(True)}
