"""bergson: an index of the training examples' gradients, one of the queries', and a search of the one with the other.

Gradients are those of the transformer blocks' layers, weights and biases: projected to 16 x 16 numbers a layer, or whole.
"""

import logging
import shutil

import torch
from bergson import (
    Attributor,
    GradientProcessor,
    IndexConfig,
    collect_gradients,
    load_module_gradients,
)
from datasets import Dataset

PACKAGE = "bergson"
logging.disable(logging.INFO)


def index(work, path, tokens, projection):
    cfg = IndexConfig(
        str(path),
        projection_dim=projection,
        include_bias=True,
        loss_reduction="mean",
        token_batch_size=work.batch * 128,
    )
    processor = GradientProcessor({}, projection_dim=projection or None, include_bias=True)
    shutil.rmtree(cfg.partial_run_path, ignore_errors=True)
    processor.save(cfg.partial_run_path)
    rows = Dataset.from_dict(
        {"input_ids": tokens.tolist(), "length": [tokens.shape[1]] * len(tokens)}
    )
    batches = [batch.tolist() for batch in torch.arange(len(tokens)).split(work.batch)]
    collect_gradients(work.model.hf, rows, processor, cfg, batches=batches)
    return cfg.partial_run_path


def search(projection):
    def start(work, folder, _):
        def run():
            work.model.requires_grad_(False)
            work.model.hf.get_input_embeddings().requires_grad_(
                True
            )  # as bergson's own commands do: backward has to reach the first layer
            train = index(work, folder / "train", work.xtr, projection)
            queries = load_module_gradients(index(work, folder / "queries", work.xte, projection))
            found = {name: torch.tensor(queries[name]) for name in queries}
            work.model.requires_grad_(True)
            scores, ids = Attributor(train).search(found, k=None)
            return torch.zeros_like(scores).scatter_(1, ids, scores) * work.lrs[0]

        return run, ["*.c_attn", "*.c_proj", "*.c_fc"]

    return start


JOBS = {"projected": search(16), "whole": search(0)}
