"""Models as data: name -> (model, examples). Everything in float64; a batch is whatever `collate` makes of examples."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate


def squared(model: nn.Module, batch: Any) -> Tensor:
    """(B,): half the squared output."""
    out = model(batch)
    out = out[0] if isinstance(out, tuple) else out
    return out.reshape(len(out), -1).square().sum(1) / 2


def classified(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


@dataclass(frozen=True)
class Case:
    model: Callable[[], nn.Module]
    examples: Callable[[], list[Any]]
    loss: Callable[[nn.Module, Any], Tensor] = squared
    collate: Callable[[list[Any]], Any] = default_collate
    at_once: bool | None = True  # all together; False: one example at a time; None: either
    falls: tuple[
        str, ...
    ] = ()  # parameters that no layer rule takes (checked where the layers are: tests/gradients/layers.py)


def numbers(*shape: int, count: int = 5) -> Callable[[], list[Tensor]]:
    return lambda: list(
        torch.randn(count, *shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )


def tokens(length: int, vocabulary: int = 9, count: int = 5) -> Callable[[], list[Tensor]]:
    return lambda: list(
        torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(3))
    )


def labelled(*shape: int, classes: int = 3) -> Callable[[], list[Any]]:
    return lambda: [(x, i % classes) for i, x in enumerate(numbers(*shape)())]


class Bare(nn.Module):
    """Parameters of the model itself, one of them a single number, and one that the loss never reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.scale, self.unused = (
            nn.Parameter(torch.randn(4, 3)),
            nn.Parameter(torch.tensor(0.7)),
            nn.Parameter(torch.ones(2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight) * self.scale


class Reused(nn.Module):
    """One layer called three times."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class TiedForm(nn.Module):
    """Embedding and output weight are one parameter; positions are broadcast over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(9, 6), nn.Embedding(7, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embedding(ids) + self.position(torch.arange(ids.shape[1], device=ids.device))
        return self.head(torch.tanh(self.mix(h)))


class Positions(nn.Module):
    """A position table sliced as a bare weight, as in many GPTs."""

    def __init__(self) -> None:
        super().__init__()
        self.position, self.out = nn.Embedding(10, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(x + self.position.weight[: x.shape[1]]))


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class ScaledDotProduct(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.rnn, self.out = (
            kind(4, 5, num_layers=2, batch_first=True, bidirectional=True),
            nn.Linear(10, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][:, -1])


class FirstSteps(nn.Module):
    """A recurrent layer whose batch is the second axis; it starts from a learned state."""

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        super().__init__()
        self.rnn, self.start = kind(4, 5, **options), nn.Parameter(torch.randn(1, 1, 5))
        self.is_lstm = kind is nn.LSTM

    def forward(self, x: Tensor) -> Tensor:
        start = self.start.expand(1, len(x), 5).contiguous()
        outputs, last = self.rnn(x.transpose(0, 1), (start, start * 2) if self.is_lstm else start)
        return (
            outputs[2] + sum(value[0] for value in last) if self.is_lstm else outputs[2] + last[0]
        )


class PackedGRU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.full((len(x),), 5)
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.rnn(packed)[1][0]


class MaskOnlyIfNeeded(nn.Module):
    """Leaves a mask of ones out, as Hugging Face models do: its operations depend on the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.mix, self.out = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, mask = batch
        h = self.emb(x)
        weights = h @ self.mix(h).transpose(1, 2)
        if not bool(mask.all()):
            weights = weights.masked_fill(mask[:, None] == 0, -1e9)
        return self.out((weights.softmax(2) @ h)[:, 0])


def half_masked() -> list[Any]:
    """The first two have no padding."""
    texts = tokens(7)()
    lengths = (7, 7, 3, 5, 7)
    return [
        (text * (torch.arange(7) < length), (torch.arange(7) < length).long())
        for text, length in zip(texts, lengths, strict=True)
    ]


class Pair(nn.Module):
    """Reads a tuple or a dict, some of it broadcast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, batch: Any) -> Tensor:
        left, right = (batch["left"], batch["right"]) if isinstance(batch, dict) else batch
        return torch.tanh(self.a(left) + self.b(right))


class Branching(nn.Module):
    """Python control flow on values: nothing that can be batched by tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([(self.up if float(row.sum()) > 0 else self.down)(row) for row in x])


class Reader(nn.Module):
    """An embedding over padded texts of different lengths: a batch is as long as its longest text."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(9, 4, padding_idx=0, **options), nn.Linear(4, 3)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        mask = batch["mask"].to(self.out.weight.dtype)
        return self.out(
            (self.embedding(batch["ids"]) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        )


class Constant(nn.Module):
    """A fixed mask of (T, T) in the model's batch: as long as a batch may be, but shared by all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tanh(self.layer(batch["x"]) @ batch["shared"])


def padded(items: list[Tensor]) -> dict[str, Tensor]:
    length = max(len(item) for item in items)
    ids = torch.stack([F.pad(item, (0, length - len(item))) for item in items])
    return {"ids": ids, "mask": ids != 0}


def with_shared(items: list[Tensor]) -> dict[str, Tensor]:
    return {
        "x": torch.stack(items),
        "shared": torch.arange(25, dtype=torch.float64).view(5, 5) / 25,
    }


def texts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 9, (length,), generator=generator) for length in (3, 6, 1, 4, 6)]


def pairs(as_dict: bool, **more: Any) -> Callable[[], list[Any]]:
    def make() -> list[Any]:
        rows = zip(numbers(4)(), numbers(2)(), strict=True)
        return [{"left": a, "right": b, **more} if as_dict else (a, b) for a, b in rows]

    return make


def with_statistics() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2, stride=2),
        nn.Flatten(),
    )
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model


CASES = {
    "mlp": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3)), labelled(4), classified
    ),
    "no-bias": Case(
        lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 3, bias=False)),
        numbers(4),
    ),
    "bare-parameters": Case(Bare, numbers(4)),
    "reused": Case(Reused, numbers(4)),
    "tied": Case(TiedForm, tokens(7)),
    "positions": Case(Positions, numbers(6, 4)),
    "batchnorm-eval": Case(with_statistics, numbers(3, 8, 8)),
    "groupnorm-conv1d": Case(
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3, padding="same", padding_mode="circular"), nn.GroupNorm(2, 4)
        ),
        numbers(2, 9),
    ),
    "layernorm": Case(
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 2)), numbers(3, 4)
    ),
    "lstm": Case(lambda: Recurrent(nn.LSTM), numbers(6, 4)),
    "gru": Case(lambda: Recurrent(nn.GRU), numbers(6, 4)),
    "rnn": Case(lambda: Recurrent(nn.RNN), numbers(6, 4)),
    "rnn-relu-no-bias": Case(
        lambda: FirstSteps(nn.RNN, nonlinearity="relu", bias=False), numbers(6, 4)
    ),
    "lstm-last-state": Case(lambda: FirstSteps(nn.LSTM), numbers(6, 4)),
    "packed-gru": Case(PackedGRU, numbers(6, 4), at_once=None),
    "mask-only-if-needed": Case(MaskOnlyIfNeeded, half_masked),
    "attention": Case(SelfAttention, numbers(6, 8)),
    "encoder-layer": Case(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), numbers(6, 8)
    ),
    "encoder": Case(
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2),
        numbers(6, 8),
    ),
    "sdpa": Case(ScaledDotProduct, numbers(6, 8)),
    "embedding": Case(lambda: nn.Embedding(9, 4), tokens(6)),
    "embedding-sparse": Case(lambda: nn.Embedding(9, 4, sparse=True), tokens(6)),
    "embedding-bag": Case(lambda: nn.EmbeddingBag(9, 4), tokens(6)),
    "tuple-batch": Case(Pair, pairs(as_dict=False)),
    "dict-batch": Case(Pair, pairs(as_dict=True)),
    "batch-with-text": Case(Pair, pairs(as_dict=True, name="x"), at_once=False),
    "padded-texts": Case(Reader, texts, collate=padded),
    "shared-tensor": Case(Constant, numbers(5, 5), collate=with_shared),
    "control-flow": Case(Branching, numbers(4), at_once=False),
}
