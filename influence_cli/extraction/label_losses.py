"""Which losses are minus the log-likelihood of a label under the outputs, up to a constant.

Letters: B examples, C classes, M numbers of an example's outputs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from influence_cli.gradients.batches import Batch, leaves, map_tensors

Losses = Callable[[Batch], Tensor]


def class_log_probs(outputs: object, count: int) -> Tensor | None:
    """(B, C) log-probabilities, float64, of logits (B, C); of the labels 0 and 1 from (B,) or
    (B, 1). None: the outputs are no logits of `count` examples.
    """
    shape = tuple(outputs.shape) if isinstance(outputs, Tensor) else ()
    if not isinstance(outputs, Tensor) or len(shape) not in (1, 2) or shape[0] != count:
        return None
    logits = outputs.detach().double().cpu()
    if len(shape) == 1 or shape[1] == 1:
        logits_B = logits.flatten()
        return torch.nn.functional.logsigmoid(torch.stack([-logits_B, logits_B], dim=1))
    return logits.log_softmax(1)


@dataclass(frozen=True)
class LabelLoss:
    """loss = -log softmax(outputs)[label], or scale |outputs - label|^2.

    `leaf`: which tensor of a batch holds the labels. `scale`: None for a cross-entropy.
    """

    leaf: int
    scale: float | None = None

    def describe(self, outputs: Tensor) -> str:
        if self.scale is not None:
            return f"a normal distribution of variance {0.5 / self.scale:.3g} around outputs()"
        log_probs_BC = class_log_probs(outputs, len(outputs))
        assert log_probs_BC is not None
        return f"the probabilities of {log_probs_BC.shape[1]} classes by outputs()"

    def expected(self, outputs: Tensor, labels: Tensor) -> Tensor | None:
        """(B,) float64: the losses of these labels; None where they are no labels."""
        if self.scale is not None:
            return self.scale * squared_distances(outputs, labels)
        log_probs_BC, classes_B = class_log_probs(outputs, len(labels)), labels.flatten().cpu()
        if log_probs_BC is None or len(classes_B) != len(log_probs_BC):
            return None
        whole_B = classes_B.double().round()
        if bool(((whole_B != classes_B) | (whole_B < 0)).any()):
            return None
        if float(whole_B.max()) >= log_probs_BC.shape[1]:
            return None
        return -log_probs_BC.gather(1, whole_B.long()[:, None])[:, 0]

    def draw(self, outputs: Tensor, labels: Tensor, generators: list[torch.Generator]) -> Tensor:
        """Labels like these, drawn from the likelihood. Each example has its own generator."""
        if self.scale is not None:
            count = labels[0].numel()
            noise = torch.stack(
                [torch.randn(count, generator=one, dtype=torch.float64) for one in generators]
            )
            drawn = outputs.detach().double().cpu().view(len(labels), -1)
            drawn = drawn + noise * (0.5 / self.scale) ** 0.5
        else:
            log_probs_BC = class_log_probs(outputs, len(labels))
            assert log_probs_BC is not None
            uniform_B = torch.stack(
                [torch.rand((), generator=one, dtype=torch.float64) for one in generators]
            )
            below_BC = log_probs_BC.exp().cumsum(1) <= uniform_B[:, None]
            drawn = below_BC.sum(1).clamp_max(log_probs_BC.shape[1] - 1)
        return drawn.view(labels.shape).to(labels.device, labels.dtype)


def squared_distances(outputs: Tensor, labels: Tensor) -> Tensor:
    """(B,) float64."""
    pair = (value.detach().double().cpu().reshape(len(labels), -1) for value in (outputs, labels))
    return (next(pair) - next(pair)).square().sum(1)


def rounding_of(
    loss: LabelLoss, outputs: Tensor, labels: Tensor, expected_B: Tensor, eps: float
) -> Tensor:
    """(B,) float64: how far losses may be from the expected ones."""
    sizes_B = 1 + float(outputs.abs().max()) + expected_B.abs()
    if loss.scale is not None:  # a difference of large numbers has their rounding
        sizes_B = sizes_B + loss.scale * squared_distances(outputs.abs(), -labels.abs())
    return 64 * eps * sizes_B


def replace_leaf(batch: Batch, leaf: int, value: Tensor) -> Batch:
    """The batch with another tensor at this place."""
    numbers = iter(range(len(leaves(batch))))
    return map_tensors(lambda tensor: value if next(numbers) == leaf else tensor, batch)


def recognize_loss(
    losses_of: Losses, batch: Batch, outputs: object, losses: Tensor, eps: float
) -> LabelLoss | None:
    """The first kind of loss, and tensor of the batch, that gives these losses, and those of other
    labels, too. None: there is none.
    """
    if not isinstance(outputs, Tensor) or not outputs.ndim or len(outputs) != len(losses):
        return None
    tensors = leaves(batch)
    for loss in candidates(tensors, outputs, losses):
        labels = tensors[loss.leaf]
        generators = [torch.Generator().manual_seed(number) for number in range(len(losses))]
        if not agrees(loss, outputs, labels, losses, eps):
            continue
        others = loss.draw(outputs, labels, generators)
        other_losses = losses_of(replace_leaf(batch, loss.leaf, others))
        if agrees(loss, outputs, others, other_losses, eps):
            return loss
    return None


def candidates(tensors: list[Tensor], outputs: Tensor, losses: Tensor) -> Iterator[LabelLoss]:
    """Tensors with one number per example as classes; then those like the outputs as targets."""
    count = len(losses)
    own = [number for number, value in enumerate(tensors) if value.ndim and len(value) == count]
    yield from (LabelLoss(number) for number in own if tensors[number].numel() == count)
    for number in own:
        value = tensors[number]
        if value.is_floating_point() and value.numel() == outputs.numel():
            total = float(squared_distances(outputs, value).sum())
            scale = float(losses.double().sum()) / total if total else 0.0
            if scale > 0:
                yield LabelLoss(number, scale)


def agrees(loss: LabelLoss, outputs: Tensor, labels: Tensor, losses: Tensor, eps: float) -> bool:
    """Whether these losses are the expected ones, within rounding."""
    expected_B = loss.expected(outputs, labels)
    if expected_B is None or tuple(losses.shape) != tuple(expected_B.shape):
        return False
    distance_B = (expected_B - losses.double().cpu()).abs()
    return bool((distance_B <= rounding_of(loss, outputs, labels, expected_B, eps)).all())
