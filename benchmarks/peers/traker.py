"""traker: its gradients of all parameters projected to 512 numbers, and their products.

The output that it differentiates is the loss times sqrt(learning rate) and the score computer leaves out the inverse of X'X, so that what
comes out is TracIn projected: the same work as TRAK, less one small inverse a checkpoint.
"""

import logging
import shutil

import torch
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from trak.score_computers import BasicScoreComputer

PACKAGE = "traker"
WIDTH = 512


class Products(BasicScoreComputer):
    def get_x_xtx_inv(self, grads, xtx):
        return grads


def projected(work, folder, _):
    class Loss(AbstractModelOutput):
        def __init__(self):
            self.scale = 1.0

        def get_output(self, model, weights, buffers, x, y):
            out = torch.func.functional_call(model, (weights, buffers), (x[None],))
            return self.scale * work.loss_each(out, y[None])[0]

        def get_out_to_loss_grad(self, model, weights, buffers, batch):
            return torch.ones(len(batch[0]), 1)

    def batches(x, y):
        return zip(x.split(work.batch), y.split(work.batch), strict=True)

    def run():
        shutil.rmtree(folder / "trak", ignore_errors=True)
        task = Loss()
        traker = TRAKer(
            work.model, task, len(work.xtr), save_dir=str(folder / "trak"), device="cpu", proj_dim=WIDTH,
            use_half_precision=False, score_computer=Products, logging_level=logging.ERROR,
        )  # fmt: skip
        for checkpoint, rate in enumerate(work.lrs):
            task.scale = rate**0.5
            traker.load_checkpoint(work.ckpts[checkpoint], model_id=checkpoint)
            for batch in batches(work.xtr, work.ytr):
                traker.featurize(batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for checkpoint, rate in enumerate(work.lrs):
            task.scale = rate**0.5
            traker.start_scoring_checkpoint(
                "queries", work.ckpts[checkpoint], checkpoint, num_targets=len(work.xte)
            )
            for batch in batches(work.xte, work.yte):
                traker.score(batch, num_samples=len(batch[0]))
        scores = traker.finalize_scores("queries")
        scale = (
            work.n_ckpt * float(traker.normalize_factor) ** 2 / WIDTH
        )  # it averages checkpoints and divides by these
        return torch.as_tensor(scores).T * scale

    return run, []


JOBS = {"projected": projected}
