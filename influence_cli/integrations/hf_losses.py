"""The loss of each example, as the heads of transformers define it for a batch.

B examples, S positions, V vocabulary, C classes. `normalise`: "example" gives what the model's own
`.loss` is for the example alone; "token" gives the sum over the example's label tokens.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of positions without loss
LossRule = Callable[[Tensor, Tensor, str], Tensor]
DrawRule = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def token_losses(logits_BSV: Tensor, labels_BS: Tensor, normalise: str) -> Tensor:
    """(B,) cross-entropy over the positions that have a label.

    An example without such a position has the loss 0.
    """
    losses_BS = label_losses(logits_BSV, labels_BS)
    sums_B = losses_BS.sum(1)
    return sums_B if normalise == "token" else sums_B / label_counts(labels_BS)


def label_losses(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    """(B, S) cross-entropy of each position; 0 where it has no label."""
    return F.cross_entropy(
        logits_BSV.float().transpose(1, 2) if is_half(logits_BSV) else logits_BSV.transpose(1, 2),
        labels_BS,
        ignore_index=IGNORED,
        reduction="none",
    )


def label_counts(labels_BS: Tensor) -> Tensor:
    """(B,) positions with a label, at least 1."""
    return (labels_BS != IGNORED).sum(1).clamp(min=1)


def label_measures(
    logits_BSV: Tensor, labels_BS: Tensor, normalise: str, is_causal: bool
) -> Tensor:
    """(B, S) minus what the label at each position adds to the loss. `is_causal`: the output at a
    position predicts the next one.
    """
    if is_causal:
        losses_BS = F.pad(label_losses(logits_BSV[:, :-1], labels_BS[:, 1:]), (1, 0))
        counts_B = label_counts(labels_BS[:, 1:])
    else:
        losses_BS, counts_B = label_losses(logits_BSV, labels_BS), label_counts(labels_BS)
    return -losses_BS if normalise == "token" else -losses_BS / counts_B[:, None]


def causal_losses(logits_BSV: Tensor, labels_BS: Tensor, normalise: str) -> Tensor:
    """(B,) like token_losses; the output at a position predicts the next one."""
    return token_losses(logits_BSV[:, :-1], labels_BS[:, 1:], normalise)


def draw_tokens(logits_BSV: Tensor, labels_BS: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S) labels drawn from the probabilities at their positions. Positions without a label
    keep that.
    """
    has_label_BS = labels_BS != IGNORED
    chances = logits_BSV[has_label_BS].float().softmax(1)
    drawn_BS = labels_BS.clone()
    if len(chances):
        drawn_BS[has_label_BS] = torch.multinomial(chances, 1, generator=generator)[:, 0]
    return drawn_BS


def draw_next_tokens(logits_BSV: Tensor, labels_BS: Tensor, generator: torch.Generator) -> Tensor:
    """(B, S) like draw_tokens; the output at a position predicts the next one."""
    drawn = draw_tokens(logits_BSV[:, :-1], labels_BS[:, 1:], generator)
    return torch.cat([labels_BS[:, :1], drawn], 1)


def class_losses(logits_BC: Tensor, labels_B: Tensor, normalise: str) -> Tensor:
    """(B,) cross-entropy."""
    return F.cross_entropy(logits_BC, labels_B, reduction="none")


def multi_label_losses(logits_BC: Tensor, labels_BC: Tensor, normalise: str) -> Tensor:
    """(B,) binary cross-entropy, mean over classes."""
    losses_BC = F.binary_cross_entropy_with_logits(
        logits_BC, labels_BC.to(logits_BC.dtype), reduction="none"
    )
    return losses_BC.mean(1)


def regression_losses(logits_BC: Tensor, labels: Tensor, normalise: str) -> Tensor:
    """(B,) squared error, mean over outputs."""
    targets_BC = labels.to(logits_BC.dtype).reshape(logits_BC.shape)
    return (logits_BC - targets_BC).square().mean(1)


def is_half(values: Tensor) -> bool:
    return values.dtype in (torch.float16, torch.bfloat16)
