"""kronfluence: pairwise scores with the identity in place of the inverse Hessian, a checkpoint at a time, on Linear and Conv2d layers."""

import copy
import logging
import warnings

from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch.utils.data import TensorDataset

PACKAGE = "kronfluence"
warnings.filterwarnings("ignore")


def identity(work, folder, _):
    layers = work.plain

    class Loss(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return work.loss_each(model(batch[0]), batch[1]).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return layers

    train, queries = TensorDataset(work.xtr, work.ytr), TensorDataset(work.xte, work.yte)

    def run():
        total = 0
        for checkpoint, rate in enumerate(work.lrs):
            work.load(checkpoint)
            model = prepare_model(copy.deepcopy(work.model), Loss())
            analyzer = Analyzer(
                f"{checkpoint}", model, Loss(), cpu=True, disable_tqdm=True, disable_model_save=True,
                log_level=logging.ERROR, output_dir=str(folder / "kronfluence"),
            )  # fmt: skip
            analyzer.fit_all_factors(
                "none",
                train,
                per_device_batch_size=work.batch,
                factor_args=FactorArguments("identity"),
                overwrite_output_dir=True,
            )
            analyzer.compute_pairwise_scores(
                "scores",
                "none",
                queries,
                train,
                work.batch,
                work.batch,
                score_args=ScoreArguments(),
                overwrite_output_dir=True,
            )
            total += rate * analyzer.load_pairwise_scores("scores")["all_modules"]
        return total

    return run, layers


JOBS = {"identity": identity}
