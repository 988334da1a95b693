"""Layers as data: name -> a model of random sizes around one layer. `Case.falls` names the
parameters that no rule takes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.cases import Case, TiedForm, numbers, squared, tokens

HOW = ("plain", "inside", "transposed", "folded", "folded inner")
ROWS = ("plain", "inside", "folded", "folded inner")  # for layers whose batch must come first
FLAT = ("plain", "inside", "folded")  # for layers that fold positions into it themselves
OUTSIDE = ("plain", "inside")  # for layers whose batch must come first and alone


class Pick:
    """Sizes and options drawn by hypothesis."""

    def __init__(self, draw: Callable[[Any], Any]) -> None:
        self.draw = draw

    def __call__(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def of(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def flag(self) -> bool:
        return self.of(False, True)

    def sizes(self, low: int, high: int) -> list[int]:
        """`low` to `high` axes of 1 to 3."""
        return [self(1, 3) for _ in range(self(low, high))]


Build = Callable[[Pick], Case]
LAYERS: dict[str, Build] = {}


def layer(build: Build) -> Build:
    LAYERS[build.__name__.replace("_", "-")] = build
    return build


def averaged(model: nn.Module, batch: Any) -> Tensor:
    """(B,): a mean over positions, of either sign."""
    return torch.sin(model(batch)).flatten(1).mean(1)


class Within(nn.Module):
    """A layer as the first one, inside a network (its input needs a gradient), over positions
    first, or with positions in its batch.
    """

    def __init__(self, layer: nn.Module, how: str) -> None:
        super().__init__()
        self.layer, self.how = layer, how
        if how == "inside":
            self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        size = len(x)
        if self.how == "inside":
            return torch.tanh(self.layer(x * self.scale))
        if self.how == "transposed":
            return self.layer(x.transpose(0, 1)).transpose(0, 1)
        if self.how == "folded":
            return self.layer(x.flatten(0, 1)).unflatten(0, (size, -1))
        if self.how == "folded inner":
            return (
                self.layer(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (-1, size)).transpose(0, 1)
            )
        return self.layer(x)


def within(
    p: Pick, layer: nn.Module, *shape: int, ways: tuple[str, ...] = HOW, vocabulary: int = 0
) -> Case:
    """`layer` on examples of `shape`, in one of `ways`; some of its parameters frozen, others
    perhaps.
    """
    how = p.of(*ways)
    if "folded" in how or how == "transposed":
        shape = (p(1, 3), *shape)
    parameters = list(layer.parameters())
    if p.flag() and len(parameters) > 1:
        parameters[p(0, len(parameters) - 1)].requires_grad_(False)
    randomize(layer)
    examples = tokens_of(shape, vocabulary) if vocabulary else numbers(*shape)
    return Case(lambda: Within(layer, how), examples, p.of(squared, averaged))


def randomize(module: nn.Module) -> None:
    """Away from the ones and zeros at which parameters and statistics begin."""
    for part in module.modules():
        for values in (*part.parameters(recurse=False), *part.buffers(recurse=False)):
            if values.is_floating_point() and not any(
                name.startswith("original") or "_u" in name for name, _ in part.named_parameters()
            ):
                values.data.uniform_(0.4, 1.6)
                if values.requires_grad:
                    values.data.sub_(1)


def tokens_of(
    shape: tuple[int, ...], vocabulary: int, count: int = 5
) -> Callable[[], list[Tensor]]:
    return lambda: list(
        torch.randint(0, vocabulary, (count, *shape), generator=torch.Generator().manual_seed(3))
    )


class Function(nn.Module):
    """Named parameters of given shapes, and a function of (self, x)."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self._forward = forward
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


# ------------------------------------------------------------ single layers
@layer
def linear(p: Pick) -> Case:
    width = p(1, 5)
    return within(p, nn.Linear(width, p(1, 5), bias=p.flag()), *p.sizes(0, 2), width)


def convolution(p: Pick, axes: int) -> Case:
    kernel, dilation = [p(1, 3) for _ in range(axes)], [p(1, 2) for _ in range(axes)]
    groups, inside = p(1, 3), p(1, 3)
    padding = p.of("same", "valid", p(0, 2), tuple(p(0, 2) for _ in range(axes)))
    stride = 1 if padding == "same" else p.of(p(1, 3), tuple(p(1, 3) for _ in range(axes)))
    mode = p.of("zeros", "reflect", "circular", "replicate")
    options = {
        "stride": stride,
        "padding": padding,
        "dilation": tuple(dilation),
        "groups": groups,
        "padding_mode": mode,
    }
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[axes - 1]
    made = kind(groups * inside, groups * p(1, 3), tuple(kernel), bias=p.flag(), **options)
    sizes = [max(3, d * (k - 1) + 1) + p(0, 2) for d, k in zip(dilation, kernel, strict=True)]
    return within(p, made, groups * inside, *sizes, ways=ROWS)


def transposed_convolution(p: Pick, axes: int) -> Case:
    strides, dilations = [p(1, 3) for _ in range(axes)], [p(1, 3) for _ in range(axes)]
    kernel, groups, inside = [p(1, 3) for _ in range(axes)], p(1, 3), p(1, 3)
    options = {
        "stride": tuple(strides),
        "dilation": tuple(dilations),
        # below the larger of stride and dilation, as torch demands
        "output_padding": tuple(
            p(0, max(s, d) - 1) for s, d in zip(strides, dilations, strict=True)
        ),
        "padding": tuple(p(0, d * (k - 1) // 2) for d, k in zip(dilations, kernel, strict=True)),
        "groups": groups,
    }
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[axes - 1]
    made = kind(groups * inside, groups * p(1, 3), tuple(kernel), bias=p.flag(), **options)
    return within(p, made, groups * inside, *(p(1, 4) for _ in range(axes)), ways=ROWS)


for axes in (1, 2, 3):
    LAYERS[f"conv-transpose{axes}d"] = lambda p, axes=axes: transposed_convolution(p, axes)  # type: ignore[misc]
    LAYERS[f"conv{axes}d"] = lambda p, axes=axes: convolution(p, axes)  # type: ignore[misc]


@layer
def embedding(p: Pick) -> Case:
    repeats = p.flag()  # repeated tokens; where they are folded into the batch, only unlike ones tell the examples apart
    vocabulary = p(2, 8) if repeats else 50
    made = nn.Embedding(vocabulary, p(1, 4), padding_idx=p.of(None, 0, -1), sparse=p.flag())
    ways = ("plain", "transposed") if repeats else ("folded", "folded inner")
    return within(p, made, *p.sizes(0, 2), ways=ways, vocabulary=vocabulary)


@layer
def layer_norm(p: Pick) -> Case:
    normed = [*p.sizes(0, 2), p(2, 3)]
    return within(
        p, nn.LayerNorm(normed, eps=p.of(1e-5, 0.1), bias=p.flag()), *p.sizes(0, 2), *normed
    )


@layer
def rms_norm(p: Pick) -> Case:
    normed = p.sizes(1, 3)
    return within(p, nn.RMSNorm(normed, eps=p.of(None, 0.1)), *p.sizes(0, 2), *normed)


@layer
def group_norm(p: Pick) -> Case:
    groups = p(1, 3)
    channels = groups * p(1, 3)
    return within(p, nn.GroupNorm(groups, channels), channels, *p.sizes(0, 2), 2, ways=ROWS)


def batch_norm(p: Pick, axes: int) -> Case:
    channels = p(1, 4)
    places = p.sizes(0, 1) if axes == 1 else [p(1, 3) for _ in range(axes)]
    made = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[axes - 1](channels)
    return within(p, made, channels, *places, ways=ROWS)


for axes in (1, 2, 3):
    LAYERS[f"batch-norm{axes}d"] = lambda p, axes=axes: batch_norm(p, axes)  # type: ignore[misc]


@layer
def gpt2_conv1d(p: Pick) -> Case:
    """A linear layer over folded positions with its weight transposed, as in transformers'
    GPT-2.
    """
    i, o, bias = p(1, 4), p(1, 4), p.flag()

    def forward(self: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, i)
        return (torch.addmm(self.b, rows, self.w) if bias else rows @ self.w).view(*x.shape[:-1], o)

    made, positions = Function(forward, w=(i, o), **({"b": (o,)} if bias else {})), p.sizes(0, 2)
    return within(p, made, *positions, i, ways=FLAT if positions else HOW)


@layer
def bare_matrix(p: Pick) -> Case:
    i, o = p(1, 4), p(1, 4)
    forward, shape = p.of(
        (lambda self, x: x @ self.w, (i, o)),
        (lambda self, x: torch.matmul(x, self.w), (i, o)),
        (lambda self, x: x.matmul(self.w) + self.w.sum(0), (i, o)),
        (lambda self, x: x @ self.w.T, (o, i)),
        (lambda self, x: F.linear(x, self.w.t().contiguous()), (i, o)),
        (
            lambda self, x: torch.addmm(input=self.w[0], mat1=x.reshape(-1, i), mat2=self.w).view(
                *x.shape[:-1], o
            ),
            (i, o),
        ),
    )
    positions = p.sizes(0, 2)
    return within(p, Function(forward, w=shape), *positions, i, ways=FLAT if positions else HOW)


@layer
def bare_vectors(p: Pick) -> Case:
    """Scales and shifts that meet the batch by broadcasting."""
    shape = [*p.sizes(0, 2), p(1, 4)]
    part = [n if p.flag() else 1 for n in shape][p(0, len(shape) - 1) :]

    def forward(self: Any, x: Tensor) -> Tensor:
        h = (self.a + x * self.b) / (self.c.square() + 1) - self.d
        h += self.d
        h *= self.b
        return torch.sub(self.a, h, alpha=2) + torch.mul(h, self.c)

    return within(p, Function(forward, a=(), b=part, c=shape[-1:], d=shape), *shape)


# ------------------------------------------------------------ attention and the blocks around it
class Attention(nn.Module):
    def __init__(self, made: nn.MultiheadAttention, cross: bool, weights: bool, mask: str) -> None:
        super().__init__()
        self.attention, self.cross, self.weights, self.mask = made, cross, weights, mask

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        queries, keys, values = batch if self.cross else (batch[0],) * 3
        options: dict[str, Any] = {"need_weights": self.weights}
        if self.mask == "of keys":  # at least half of them stay
            options["key_padding_mask"] = keys[..., 0] > keys[..., 0].median(1, keepdim=True).values
        elif self.mask:
            hidden = torch.ones(queries.shape[1], keys.shape[1], dtype=torch.bool).triu(1)
            options["attn_mask"] = hidden if self.mask == "bool" else hidden.to(queries.dtype) * -3
        if not self.attention.batch_first:
            queries, keys, values = (value.transpose(0, 1) for value in (queries, keys, values))
        out, weights = self.attention(queries, keys, values, **options)
        out = out if self.attention.batch_first else out.transpose(0, 1)
        return out if weights is None else out * (1 + weights.square().sum((1, 2))[:, None, None])


def triples(*shapes: tuple[int, int]) -> Callable[[], list[Any]]:
    return lambda: list(zip(*(numbers(*shape)() for shape in shapes), strict=True))


@layer
def attention(p: Pick) -> Case:
    heads = p(1, 2)
    width, cross = heads * p(1, 3), p.flag()
    k, v = (p(1, 5), p(1, 5)) if cross and p.flag() else (width, width)
    extra = {
        "bias": p.flag(),
        "add_zero_attn": p.flag(),
        "add_bias_kv": p.of(False, False, True),
        "batch_first": p.flag(),
    }
    made = nn.MultiheadAttention(width, heads, kdim=k, vdim=v, **extra)
    if extra["bias"]:
        randomize(made)
    length, keys = p(1, 3), p(1, 3)
    falls = ("attention.bias_k", "attention.bias_v") if extra["add_bias_kv"] else ()
    examples = triples((length, width), (keys, k), (keys, v))
    how = p.flag(), p.of("", "bool", "float", "of keys")
    return Case(
        lambda: Attention(made, cross, *how), examples, p.of(squared, averaged), falls=falls
    )


def transformer_options(p: Pick) -> tuple[int, dict[str, Any]]:
    heads = p(1, 2)
    width, inner = heads * p(2, 3), p(1, 5)
    options = {
        "batch_first": True,
        "norm_first": p.flag(),
        "bias": p.flag(),
        "activation": p.of("relu", "gelu"),
    }
    return width, {"d_model": width, "nhead": heads, "dim_feedforward": inner, **options}


@layer
def encoder_layer(p: Pick) -> Case:
    width, options = transformer_options(p)
    made = nn.TransformerEncoderLayer(**options)
    return within(p, made, p(1, 3), width, ways=OUTSIDE)


class Decoder(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.decoder = nn.TransformerDecoderLayer(**options)
        randomize(self.decoder)

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.decoder(
            batch[0],
            batch[1],
            tgt_mask=nn.Transformer.generate_square_subsequent_mask(batch[0].shape[1]).double(),
        )


@layer
def decoder_layer(p: Pick) -> Case:
    width, options = transformer_options(p)
    examples = triples((p(1, 3), width), (p(1, 3), width))
    return Case(lambda: Decoder(**options), examples, p.of(squared, averaged))


class Separate(nn.Module):
    """Attention as in BERT: the key's bias adds the same to all scores of a query, so that its
    gradient is zero but for rounding.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        return x + self.o(
            (torch.softmax(q @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2)
        )


@layer
def separate_projections(p: Pick) -> Case:
    heads = p(1, 2)
    width = heads * p(2, 3)
    return within(p, Separate(width, heads), p(2, 3), width, ways=OUTSIDE)


# ------------------------------------------------------------ a parameter used several times
@layer
def called_twice(p: Pick) -> Case:
    width, long = p(2, 4), p(2, 4)
    made, shape = p.of(
        (nn.Linear(width, width), (long, width)),
        (nn.Conv1d(width, width, 3, padding=1), (width, long)),
        (nn.LayerNorm(width), (long, width)),
        (nn.GroupNorm(1, width), (width, long)),
    )
    return within(p, nn.Sequential(made, nn.Tanh(), made), *shape, ways=OUTSIDE)


@layer
def called_on_long_and_short(p: Pick) -> Case:
    """The same layer on every position and on their mean."""
    width = p(1, 4)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(width, p(1, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * torch.tanh(self.one(x.mean(1, keepdim=True)))

    return within(p, Both(), p(1, 4), width, ways=OUTSIDE)


@layer
def tied(p: Pick) -> Case:
    return Case(TiedForm, tokens(p(1, 7)), p.of(squared, averaged))


@layer
def one_weight_of_two_layers(p: Pick) -> Case:
    """As the kernel of a convolution, of a linear layer and of an embedding, and as scales."""
    width = p(2, 4)

    def forward(self: Any, x: Tensor) -> Tensor:  # x (B, S, width)
        h = F.conv1d(x.transpose(1, 2), self.w.unsqueeze(2)).transpose(1, 2)
        h = F.linear(torch.tanh(h), self.w) + F.embedding((x[..., 0] > 0).long(), self.w)
        return F.layer_norm(h, (width,), self.w[0], self.w[1]) * self.w[-1] + h @ self.w

    return within(p, Function(forward, w=(width, width)), p(1, 3), width, ways=OUTSIDE)


# ------------------------------------------------------------ what does not depend on the batch, and meets it by broadcasting
@layer
def position_table(p: Pick) -> Case:
    width, long = p(1, 4), p(1, 3)
    meet = p.of(
        lambda x, table: x + table,
        lambda x, table: x + table.unsqueeze(0),
        lambda x, table: x + table.expand(len(x), -1, -1),
        lambda x, table: torch.cat([table.expand_as(x), x], 1),
        lambda x, table: torch.cat([x, table[:1].unsqueeze(0).expand(len(x), 1, -1)], 1),
    )
    at = p.of(
        lambda table: table.weight[:long],
        lambda table: table(torch.arange(long)),
        lambda table: table(torch.arange(long)[None])[0],
    )

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(5, width), nn.Linear(width, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(meet(x, at(self.table))))

    return Case(Table, numbers(long, width), p.of(squared, averaged))


@layer
def position_table_over_folded_rows(p: Pick) -> Case:
    """Several texts an example, as in multiple choice: the table meets the rows of all of them."""
    width, long = p(1, 3), p(1, 3)
    made = Function(
        lambda self, x: torch.tanh(x + self.table) * self.scale, table=(long, width), scale=(width,)
    )
    return within(p, made, long, width)


@layer
def layers_of_a_table(p: Pick) -> Case:
    """A network on learned queries, one for all examples, before they meet the batch."""
    width, long = p(1, 4), p(1, 3)

    class Queries(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.net = (
                nn.Parameter(torch.randn(long, width)),
                nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width)),
            )
            self.first = nn.Linear(width, width)

        def forward(self, x: Tensor) -> Tensor:  # the same layers see the batch too
            scale = self.net(self.queries)
            return self.net(torch.tanh(self.first(x) + scale)) * scale

    return Case(Queries, numbers(long, width), p.of(squared, averaged))


# ------------------------------------------------------------ weights computed from parameters
@layer
def computed_weights(p: Pick) -> Case:
    width, long = p(2, 4), p(3, 5)
    made, shape = p.of(
        (nn.Linear(width, 3), (long, width)), (nn.Conv1d(width, 3, 3), (width, long))
    )
    of = p.of(
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        torch.nn.utils.weight_norm,
        torch.nn.utils.spectral_norm,
    )
    return replace(
        within(p, nn.Sequential(), *shape, ways=OUTSIDE),
        model=lambda: nn.Sequential(of(made), nn.Tanh()),
    )


@layer
def low_rank(p: Pick) -> Case:
    """LoRA: a frozen weight, and a product of two trained ones beside it or added to it."""
    width, out, rank = p(1, 4), p(1, 4), p(1, 2)
    forward = p.of(
        lambda self, x: F.linear(x, self.w + self.b @ self.a, self.c),
        lambda self, x: F.linear(x, self.w, self.c) + F.linear(F.linear(x, self.a), self.b) * 0.5,
        lambda self, x: x @ self.a.T @ self.b.T + F.linear(x, self.w, self.c),
    )
    made = Function(forward, w=(out, width), a=(rank, width), b=(out, rank), c=(out,))
    made.w.requires_grad_(False)
    return within(p, made, *p.sizes(0, 2), width)


@layer
def scaled_embedding(p: Pick) -> Case:
    vocabulary, width = p(2, 6), p(1, 4)
    made = Function(
        lambda self, ids: F.embedding(ids, self.w * self.scale),
        w=(vocabulary, width),
        scale=(width,),
    )
    return within(p, made, *p.sizes(1, 2), ways=("plain", "transposed"), vocabulary=vocabulary)


# ------------------------------------------------------------ uses that no rule knows, taken by torch.func
class Undocumented(torch.autograd.Function):
    """A linear layer as a function of its own, which torch.func can't batch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, -2).T @ g.flatten(0, -2)


class Generated(Undocumented):
    """One that it can."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


UNKNOWN: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "prelu": (lambda: nn.PReLU(4), (4,)),
    "instance-norm": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 4)),
    "bilinear": (lambda: Function(lambda self, x: F.bilinear(x, x, self.w), w=(2, 4, 4)), (3, 4)),
    "einsum": (
        lambda: Function(lambda self, x: torch.einsum("bsi,io->bso", x, self.w), w=(4, 2)),
        (3, 4),
    ),
    "matrices-of-heads": (lambda: Function(lambda self, x: x @ self.w, w=(3, 4, 2)), (3, 2, 4)),
    "matrix-first": (lambda: Function(lambda self, x: self.w @ x, w=(2, 3)), (3, 4)),
    "mm": (lambda: Function(lambda self, x: x.mm(self.w), w=(4, 2)), (4,)),
    "scaled-addmm": (
        lambda: Function(lambda self, x: torch.addmm(x, x, self.w, beta=2), w=(4, 4)),
        (4,),
    ),
    "vector": (lambda: Function(lambda self, x: x @ self.w, w=(4,)), (3, 4)),
    "rows-by-index": (lambda: Function(lambda self, x: self.w[(x > 0).long()], w=(2, 3)), (3, 4)),
    "repeat": (lambda: Function(lambda self, x: x + self.w.repeat(len(x), 1, 1), w=(3, 4)), (3, 4)),
    "expanded-over-rows": (
        lambda: Function(lambda self, x: x + self.w.expand(3 * len(x), -1).view_as(x), w=(1, 4)),
        (3, 4),
    ),
    "rows-around-examples": (
        lambda: Function(
            lambda self, x: (
                F.linear(x.transpose(0, 1).flatten(0, 2), self.w).view(3, -1, 2, 4).transpose(0, 1)
            ),
            w=(4, 4),
        ),
        (3, 2, 4),
    ),
    "power": (lambda: Function(lambda self, x: x.abs() ** self.w, w=(4,)), (3, 4)),
    "own-function": (
        lambda: Function(lambda self, x: Generated.apply(x, self.w), w=(4, 2)),
        (3, 4),
    ),
    "also-by-a-rule": (
        lambda: Function(
            lambda self, x: x @ self.w + torch.einsum("bsi,io->bso", x, self.w), w=(4, 2)
        ),
        (3, 4),
    ),
}
SLOW: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "own-function": (
        lambda: Function(lambda self, x: Undocumented.apply(x, self.w), w=(4, 2)),
        (3, 4),
    ),
    "checkpointed": (
        lambda: Function(
            lambda self, x: checkpoint(lambda x: torch.tanh(x @ self.w), x, use_reentrant=False),
            w=(4, 2),
        ),
        (3, 4),
    ),
}
