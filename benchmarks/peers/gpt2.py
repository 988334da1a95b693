"""A GPT-2 of Hugging Face of W4's size, for peers that take no other model: `Work` is used as that of workloads.py, `write_run` as well."""

import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

QUERIES = 16
DEFINITION = """import runpy
from pathlib import Path
import torch
W = runpy.run_path(str(Path(__file__).with_name("gpt2.py")))["Work"]({n})
def model(): return W.model
def train_data(): return torch.utils.data.TensorDataset(W.xtr, W.ytr)
def query_data(): return torch.utils.data.TensorDataset(W.xte, W.yte)
def loss(model, batch): return W.loss_each(model(batch[0]), batch[1])
"""


class Logits(nn.Module):
    def __init__(self):
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        sizes = {"n_layer": 4, "n_embd": 256, "n_head": 4, "vocab_size": 4096, "n_positions": 128}
        off = {
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "use_cache": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        self.hf = GPT2LMHeadModel(GPT2Config(**sizes, **off))

    def forward(self, x):
        return self.hf(input_ids=x).logits


class Work:
    name, n_ckpt, lrs = "gpt2", 1, (0.1,)

    def __init__(self, n_train):
        torch.manual_seed(0)
        self.model = Logits().eval()
        x = torch.randint(
            0, 4096, (n_train + QUERIES, 128), generator=torch.Generator().manual_seed(7)
        )
        self.xtr, self.xte = x[:n_train], x[n_train:]
        self.ytr, self.yte = self.xtr, self.xte

    def loss_each(self, out, y):
        losses = F.cross_entropy(
            out[:, :-1].reshape(-1, out.shape[-1]), y[:, 1:].reshape(-1), reduction="none"
        )
        return losses.view(len(y), -1).mean(1)


def write_run(folder, n_train):
    from safetensors.torch import save_model

    folder, work = Path(folder), Work(n_train)
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(__file__, folder / "gpt2.py")
    (folder / "definition.py").write_text(DEFINITION.format(n=n_train))
    save_model(
        work.model,
        str(folder / "checkpoints/step-000100.safetensors"),
        metadata={"learning_rate": str(work.lrs[0])},
    )
