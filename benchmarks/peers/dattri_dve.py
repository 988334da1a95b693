"""dattri's own data value embedding (DVE) on a recorded run: every training occurrence's score for the first queries.

    PYTHON benchmarks/peers/dattri_dve.py RUN OUT.npz [--queries 50] [--steps N]

PYTHON is one with dattri (read and tried: 0.3.0) and torch. OUT.npz gets `step` (M,), `example` (M,), `scores` (M, N) and `seconds`.
With --steps N the run ends after its first N steps, and the queries are scored at the parameters there.

Class: `dattri.algorithm.dvemb.DVEmbAttributor`, used as it is meant to be: `cache_gradients` in the training loop before each update,
`cache` after training, `attribute` last. Nothing is subclassed or patched.

Configuration: `proj_dim=None, factorization_type="none"`: whole gradients of all parameters, no random projection. (The factorized
choices, "kronecker" and "elementwise", see Linear layers only; without a projection they hold the same numbers in factors.)
dattri adds up an example's embeddings within an epoch (`epoch_embeddings.index_add_`) and keeps one table of (largest index + 1) x
parameters per epoch. So each occurrence is given an index of its own, 0 to M - 1 in order of training, all in "epoch" 0: no two are
added up, and `attribute`'s rows are the occurrences. Epochs are only where rows are kept: `m_matrix` is carried through them all.

What its source computes, g being rows of per-example gradients, eta = lr / B (`learning_rates.append(learning_rate / len(indices))`):

    dvemb_t = eta_t * grads_t - eta_t * (grads_t @ m_matrix.T)      for t = T-1 ... 0, m_matrix starting at zero
    m_matrix += dvemb_t.T @ grads_t
    scores = train_embeddings @ test_grads.T                        test_grads at the model's parameters when `attribute` is called

With P_t = I - m_matrix as the steps after t left it, that is E_t(z) = lr_t / B_t * P_t g_t(z), and for the step before
P_(t-1) = P_t (I - lr_t / B_t * sum_y g_y g_y^T): the naive formula exactly. (Tried on the digits' first 60 steps against that product in
double precision: within 1.5e-7, 5e-7 of the whole.)

Sign: E_t(z) is the change of the last parameters if z's term were left out of step t (still divided by B), so positive = its absence
would raise the query's loss = proponent. That is the orientation wanted: no sign is turned here. Scale: loss units, lr / B included.

What it assumes:
- plain SGD on the batch's mean loss (lr / B, above): a run with a sum, momentum or weight decay is refused here. Every step has its own
  lr and B, so neither has to be constant;
- sum_y g_y g_y^T (the empirical Fisher) in place of the batch's Hessian, in all parameters: the paper's approximation;
- one example's loss at a time: `get_grad_loss_func` is vmap(grad(loss)), so a batch has to be a tuple of tensors (`d.to(device) for d in
  batch_data`) and the loss has to go through vmap; the definition's loss is called with batches of one;
- room for all gradients (M x P), all embeddings (M x P) and m_matrix (P x P), dense, with M occurrences and P parameters;
- `cached_gradients[0]` is read for the size, so there must be an epoch 0; an error is raised if there is a NaN (not if infinite).
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

if Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path.pop(0)  # else `dattri` is the dattri.py beside this file

import numpy as np
import torch
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader, Subset, default_collate

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


class WithLoss(torch.nn.Module):
    """The definition's loss as a forward pass, so that `functional_call` can put in parameters whatever the loss does with the model."""

    def __init__(self, definition):
        super().__init__()
        self.model = definition.model()
        self.loss = definition.loss

    def forward(self, batch):
        return self.loss(self.model, batch)


def load_definition(run):
    sys.path.insert(0, str(run))
    spec = importlib.util.spec_from_file_location("definition", run / "definition.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["definition"] = module
    spec.loader.exec_module(module)
    return module


def load_safetensors(path):
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    tensors = {}
    for name, entry in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            numbers = torch.frombuffer(
                bytearray(raw[start + begin : start + end]), dtype=DTYPES[entry["dtype"]]
            )
            tensors[name] = numbers.reshape(entry["shape"])
    return tensors


def load_trajectory(path, steps):
    header, *lines = map(json.loads, path.read_text().splitlines())
    optimizer = header["optimizer"]
    if (
        header["reduction"] != "mean"
        or optimizer["name"] != "sgd"
        or optimizer.get("momentum")
        or optimizer.get("weight_decay")
    ):
        raise SystemExit(
            f"dattri's data value embedding is for plain SGD on the mean loss, this run is {header}"
        )
    return lines[:steps]


def main():
    parser = argparse.ArgumentParser(description="dattri's data value embedding of a recorded run")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--steps", type=int, help="only the run's first steps")
    args = parser.parse_args()

    definition = load_definition(args.run.resolve())
    checkpoints = args.run / "checkpoints"
    lines = load_trajectory(args.run / "trajectory.jsonl", args.steps)
    train, queries = definition.train_data(), definition.query_data()
    model = WithLoss(definition)
    model.model.load_state_dict(load_safetensors(checkpoints / "step-000000.safetensors"))
    model.train()

    def loss(params, example):
        return torch.func.functional_call(model, params, ([part[None] for part in example],))[0]

    start = time.perf_counter()
    task = AttributionTask(
        loss, model, model.state_dict()
    )  # the checkpoint is not used: gradients are at the model's parameters
    attributor = DVEmbAttributor(task, proj_dim=None, factorization_type="none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    first = 0  # index of the step's first occurrence
    for line in lines:
        batch = default_collate([train[i] for i in line["examples"]])
        indices = torch.arange(first, first + len(line["examples"]))
        attributor.cache_gradients(0, tuple(batch), indices, line["lr"])
        first += len(indices)
        optimizer.param_groups[0]["lr"] = line["lr"]
        optimizer.zero_grad()
        model(batch).mean().backward()
        optimizer.step()
    trained = time.perf_counter()
    attributor.cache()
    embedded = time.perf_counter()
    loader = DataLoader(Subset(queries, range(min(args.queries, len(queries)))), batch_size=64)
    scores = attributor.attribute(loader, epoch=0)
    end = time.perf_counter()

    np.savez(
        args.out,
        step=np.concatenate([np.full(len(line["examples"]), line["step"]) for line in lines]),
        example=np.concatenate([np.array(line["examples"]) for line in lines]),
        scores=scores.detach().cpu().numpy(),
        seconds=end - start,
    )
    seconds = f"{end - start:.1f} s: training with gradients {trained - start:.1f}, embeddings {embedded - trained:.1f}, "
    print(f"{tuple(scores.shape)} scores in {seconds}queries {end - embedded:.1f}")
    recorded = checkpoints / f"step-{lines[-1]['step'] + 1:06d}.safetensors"
    if recorded.exists():
        ours = model.model.state_dict()
        gap = max(
            (ours[name].double() - tensor.double()).abs().max().item()
            for name, tensor in load_safetensors(recorded).items()
        )
        print(f"last parameters are within {gap:.1e} of {recorded.name}")


if __name__ == "__main__":
    main()
