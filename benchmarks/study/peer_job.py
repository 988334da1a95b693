"""One job of another library on a run folder: python peer_job.py JOB RUN WEIGHTS QUERIES OUT.npy

Its environment has torch and the library, not influence. Writes the scores, (Q, N).
"""

import importlib.util
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset

BATCH = 100  # examples
warnings.filterwarnings("ignore")


def load(run: Path, weights: Path):
    """The definition, and its model with the weights of the last checkpoint."""
    spec = importlib.util.spec_from_file_location("definition", run / "definition.py")
    definition = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(definition)
    model = definition.model()
    with np.load(weights) as arrays:
        model.load_state_dict({name: torch.from_numpy(arrays[name]) for name in arrays.files})
    return definition, model.eval()


def ekfac(definition, model, train, queries, folder: Path, true_fisher: bool):
    """kronfluence: the sum over its layers (Linear, Conv2d), a tenth of the mean as damping."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    generator = torch.Generator().manual_seed(0)

    class Loss(Task):
        def compute_train_loss(self, batch, model, sample=False):
            if not sample:
                return definition.loss(model, batch).sum()
            outputs = definition.outputs(model, batch)
            drawn = definition.sample(outputs.detach(), batch, generator)
            return definition.loss_from_outputs(outputs, drawn).sum()

        def compute_measurement(self, batch, model):
            return definition.loss(model, batch).sum()

    model = prepare_model(model, Loss())
    analyzer = Analyzer(
        "study", model, Loss(), cpu=True, disable_tqdm=True, disable_model_save=True,
        log_level=logging.ERROR, output_dir=str(folder),
    )  # fmt: skip
    factors = FactorArguments("ekfac", use_empirical_fisher=not true_fisher)
    analyzer.fit_all_factors("factors", train, per_device_batch_size=BATCH, factor_args=factors)
    analyzer.compute_pairwise_scores(
        "scores", "factors", queries, train, BATCH, BATCH,
        score_args=ScoreArguments(damping_factor=None),
    )  # fmt: skip
    return analyzer.load_pairwise_scores("scores")["all_modules"]


def trak(definition, model, train, queries, folder: Path):
    """traker with one checkpoint, and as many projected numbers as `--method trak` takes."""
    from trak import TRAKer

    width = min(2048, len(train) // 4)
    traker = TRAKer(
        model, "image_classification", len(train), save_dir=str(folder), device="cpu",
        proj_dim=width, use_half_precision=False, logging_level=logging.ERROR,
    )  # fmt: skip

    def batches(data):
        for batch in torch.utils.data.DataLoader(data, BATCH):
            yield batch[:2]

    traker.load_checkpoint(model.state_dict(), model_id=0)
    for batch in batches(train):
        traker.featurize(batch, num_samples=len(batch[0]))
    traker.finalize_features()
    traker.start_scoring_checkpoint("queries", model.state_dict(), 0, num_targets=len(queries))
    for batch in batches(queries):
        traker.score(batch, num_samples=len(batch[0]))
    return torch.as_tensor(traker.finalize_scores("queries")).T


def main() -> None:
    job, run, weights, count, out = sys.argv[1:]
    definition, model = load(Path(run), Path(weights))
    with tempfile.TemporaryDirectory() as folder:
        train = definition.train_data()
        data = train, Subset(definition.query_data(), range(int(count)))
        if job == "trak":
            scores = trak(definition, model, *data, Path(folder))
        else:
            scores = ekfac(definition, model, *data, Path(folder), job == "ekfac-true")
    np.save(out, torch.as_tensor(scores).double().numpy())


if __name__ == "__main__":
    main()
