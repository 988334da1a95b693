"""The four benchmark workloads W1-W4, and the floor they are measured against.

Everything is seeded and random: only time, memory and numerical agreement are measured on them, never attribution quality.
`write_run(name, folder)` lays one out as a run folder: safetensors checkpoints with step and learning rate, and a definition.py.

    python workloads.py w1 FOLDER [N_TRAIN]
"""

import shutil
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- models
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def forward(self, x):
        return self.net(x)

    @property
    def last(self):
        return self.net[4]


class Block(nn.Module):
    def __init__(self, cin, cout, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        self.short = None
        if stride != 1 or cin != cout:
            self.short = nn.Conv2d(cin, cout, 1, stride, bias=False)

    def forward(self, x):
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.act2(y + (x if self.short is None else self.short(x)))


class ResNet(nn.Module):
    """ResNet-14-like, about 0.44 M parameters, BatchNorm in eval mode."""

    def __init__(self, w=24):
        super().__init__()
        self.stem = nn.Conv2d(3, w, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(w)
        self.act = nn.ReLU()
        blocks = []
        for i, c in enumerate((w, 2 * w, 4 * w)):
            blocks += [Block(w if i == 0 else c // 2, c, 1 if i == 0 else 2), Block(c, c, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(4 * w, 10)

    def forward(self, x):
        h = self.blocks(self.act(self.bn(self.stem(x))))
        return self.last(h.mean((2, 3)))


class Attn(nn.Module):
    """Fused qkv + output projection over SDPA."""

    def __init__(self, d, heads, causal):
        super().__init__()
        self.h, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x):
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.h, d // self.h).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).reshape(b, t, d))


class TBlock(nn.Module):
    def __init__(self, d, heads, causal):
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.attn = Attn(d, heads, causal)
        self.fc, self.proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        x = x + self.attn(self.n1(x))
        return x + self.proj(F.gelu(self.fc(self.n2(x))))


class Encoder(nn.Module):
    def __init__(self, vocab=8000, d=128, layers=4, seq=64, classes=2):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(seq, d)
        self.blocks = nn.Sequential(*[TBlock(d, 4, False) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)
        self.last = nn.Linear(d, classes)

    def forward(self, x):
        h = self.emb(x) + self.pos.weight[: x.shape[-1]]
        return self.last(self.norm(self.blocks(h))[:, 0])


class GPT(nn.Module):
    def __init__(self, vocab=4096, d=256, layers=4, seq=128):
        super().__init__()
        self.emb, self.pos = nn.Embedding(vocab, d), nn.Embedding(seq, d)
        self.blocks = nn.Sequential(*[TBlock(d, 4, True) for _ in range(layers)])
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, vocab, bias=False)
        self.head.weight = self.emb.weight  # tied, as in GPT-2

    def forward(self, x):
        h = self.emb(x) + self.pos.weight[: x.shape[-1]]
        return self.head(self.norm(self.blocks(h)))


class Work:
    """One workload: model, checkpoints, data, per-example loss, sizes."""

    def __init__(self, name, n_train=None, n_test=None):
        self.name = name
        sizes = {
            "w1": (5000, 200, 3, MLP),
            "w2": (1000, 50, 2, ResNet),
            "w3": (1000, 50, 2, Encoder),
            "w4": (512, 16, 1, GPT),
        }
        ntr, nte, self.n_ckpt, cls = sizes[name]
        ntr, nte = n_train or ntr, n_test or nte
        torch.manual_seed(0)
        self.model = cls().eval()
        self.ckpts = []
        for s in range(self.n_ckpt):
            torch.manual_seed(100 + s)
            m = cls()
            if name == "w2":  # non-trivial running statistics
                for mod in m.modules():
                    if isinstance(mod, nn.BatchNorm2d):
                        mod.running_mean.normal_(0, 0.1)
                        mod.running_var.uniform_(0.5, 1.5)
            self.ckpts.append({k: v.clone() for k, v in m.state_dict().items()})
        self.lrs = [0.1 / (1 + i) for i in range(self.n_ckpt)]
        g = torch.Generator().manual_seed(7)
        n = ntr + nte
        if name == "w1":
            x = torch.randn(n, 784, generator=g)
        elif name == "w2":
            x = torch.randn(n, 3, 32, 32, generator=g)
        elif name == "w3":  # Zipf-like token ids, so that words overlap as in text
            r = torch.rand(n, 64, generator=g)
            x = (8000**r).long().clamp_(max=7999)
        else:
            x = torch.randint(0, 4096, (n, 128), generator=g)
        if name == "w4":
            y = x
        else:
            y = torch.randint(0, 2 if name == "w3" else 10, (n,), generator=g)
        self.xtr, self.ytr, self.xte, self.yte = x[:ntr], y[:ntr], x[ntr:], y[ntr:]
        self.params = sum(p.numel() for p in self.model.parameters())
        self.load(0)

    def load(self, c):
        self.model.load_state_dict(self.ckpts[c])

    def loss_each(self, out, y):
        """Per-example loss; causal LM: mean over its tokens."""
        if self.name == "w4":
            lo = out[:, :-1].reshape(-1, out.shape[-1])
            return (
                F.cross_entropy(lo, y[:, 1:].reshape(-1), reduction="none").view(len(y), -1).mean(1)
            )
        return F.cross_entropy(out, y, reduction="none")


# ---------------------------------------------------------------- floor
def floor_seconds(w, b, repeats=3):
    """Least seconds of one plain forward+backward (mean loss, all weight gradients) over the training set, batch size b."""
    best = float("inf")
    for _ in range(repeats):
        t = time.perf_counter()
        for i in range(0, len(w.xtr), b):
            loss = w.loss_each(w.model(w.xtr[i : i + b]), w.ytr[i : i + b]).mean()
            torch.autograd.grad(loss, list(w.model.parameters()))
        best = min(best, time.perf_counter() - t)
    return best


DEFINITION = """import sys
from pathlib import Path
import torch
sys.path.insert(0, str(Path(__file__).parent))
from workloads import Work
W = Work("{name}", n_train={n})
def model(): return type(W.model)()
def train_data(): return torch.utils.data.TensorDataset(W.xtr, W.ytr)
def query_data(): return torch.utils.data.TensorDataset(W.xte, W.yte)
def loss(model, batch): return W.loss_each(model(batch[0]), batch[1])
"""


def write_run(name, folder, n_train=None):
    from safetensors.torch import save_model

    folder, w = Path(folder), Work(name, n_train)
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, folder / "workloads.py")
    (folder / "definition.py").write_text(DEFINITION.format(name=name, n=len(w.xtr)))
    for c, lr in enumerate(w.lrs):
        w.load(c)
        save_model(
            w.model,
            str(folder / f"checkpoints/step-{(c + 1) * 100:06d}.safetensors"),
            metadata={"step": str((c + 1) * 100), "learning_rate": str(lr)},
        )


if __name__ == "__main__":
    write_run(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
