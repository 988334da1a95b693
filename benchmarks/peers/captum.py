"""captum: TracInCP by its rule for batches (Linear, Conv2d) or one example at a time (all parameters); TracInCPFast (last layer)."""

import warnings

from captum.influence import TracInCP, TracInCPFast
from torch.utils.data import DataLoader, TensorDataset

PACKAGE = "captum"
warnings.filterwarnings("ignore")


def arguments(work, loss, batch):
    def load(model, checkpoint):
        model.load_state_dict(work.ckpts[checkpoint])
        return work.lrs[checkpoint]

    return {
        "model": work.model,
        "train_dataset": TensorDataset(work.xtr, work.ytr),
        "checkpoints": range(work.n_ckpt),
        "checkpoints_load_func": load,
        "loss_fn": loss,
        "batch_size": batch,
    }


def queries(work, batch):
    return DataLoader(TensorDataset(work.xte, work.yte), batch)


def batched(work, folder, _):
    given = arguments(work, lambda out, y: work.loss_each(out, y).sum(), work.batch)
    method = TracInCP(**given, layers=work.plain, sample_wise_grads_per_batch=True)
    return lambda: method.influence(queries(work, work.batch)), work.plain


def one_by_one(work, folder, _):
    batch = (
        32 if work.name == "w1" else 1
    )  # a batch's whole graph is gone through for each example: only small ones gain by batches
    method = TracInCP(**arguments(work, work.loss_each, batch))
    return lambda: method.influence(queries(work, batch)), []


def fast(work, folder, _):
    name = next(name for name, module in work.model.named_modules() if module is work.model.last)
    given = arguments(work, lambda out, y: work.loss_each(out, y).sum(), work.batch)
    method = TracInCPFast(final_fc_layer=work.model.last, **given)
    return lambda: method.influence((work.xte, work.yte)), [f"{name}.weight"]


JOBS = {"batched": batched, "one by one": one_by_one, "fast": fast}
