"""What makes gradients meaningless, found on the first examples of a run."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from influence_cli.errors import GradientError, listed
from influence_cli.gradients.autograd_gradients import LossesAndGradients
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.tolerances import close, differing, rounding


def check_eval_mode(model: nn.Module, name: str) -> None:
    """Raise GradientError where the quantity `name` switched a module to train mode."""
    training = [path or "the model" for path, module in model.named_modules() if module.training]
    if training:
        raise GradientError(
            f"{name} switched {listed(training)} to train mode",
            "expected: the model stays in eval mode, so that each example has one gradient",
            "remove .train(): influence supports neither dropout nor batch statistics",
        )


def check_not_random(
    single: Callable[[Batch], LossesAndGradients],
    batches: Sequence[Batch],
    first_results: Sequence[LossesAndGradients],
    name: str,
) -> None:
    """Raise GradientError where a batch of one gives another loss or gradient the second time."""
    for i, (batch, (first_loss, first_grads)) in enumerate(
        zip(batches, first_results, strict=True)
    ):
        loss, grads = single(batch)
        if not all(bool(torch.isfinite(value).all()) for value in (loss, *grads.values())):
            continue  # capture reports it, with its checkpoint
        if not close(loss, first_loss) or differing(grads, first_grads):
            raise random_quantity(f"{name} of example {i}", float(first_loss[0]), float(loss[0]))


def check_loss_order(name: str, batch_losses: Tensor, single_losses: Tensor) -> None:
    """Raise GradientError where a batch gives examples the losses of others: half of those whose
    losses differ, or more.
    """
    rounded = rounding(single_losses.dtype) * single_losses.abs().max()
    differences_BB = (batch_losses[:, None] - single_losses[None, :]).abs()
    moved = differences_BB.diagonal() > rounded
    others = (differences_BB <= rounded / 16) & moved[:, None]  # closer than rounding: no chance
    if int(others.any(1).sum()) * 2 < max(1, int(moved.sum())):
        return
    example = int(others.any(1).nonzero()[0])
    other = int(others[example].nonzero()[0])
    raise GradientError(
        f"in a batch, {name} gives example {example} the loss of example {other}",
        f"expected: {float(single_losses[example]):.6g}, its loss alone; found: "
        f"{float(batch_losses[example]):.6g}",
        "collate() or the loss reorders the examples; keep the order of the items",
    )


def random_quantity(subject: str, first: float, second: float) -> GradientError:
    return GradientError(
        f"{subject} is random: {first:.6g} at first, {second:.6g} when computed again",
        "expected: the same loss and gradient each time",
        "look for functional dropout (F.dropout needs training=self.training), noise or sampling",
    )


def unlike_losses(name: str, batch_losses: Tensor, single_losses: Tensor) -> str:
    """What the user should know where a batch changes an example's loss; else no text."""
    if close(batch_losses, single_losses):
        return ""
    worst = int((batch_losses - single_losses).abs().argmax())
    return (
        f"{name} of example {worst} is {single_losses[worst]:.6g} alone and "
        f"{batch_losses[worst]:.6g} in a batch: examples influence each other (batch "
        "statistics? padding that is not masked?), so gradients depend on the batches"
    )


def described(error: Exception) -> str:
    """One line about what a model does that capture can't do."""
    if "saved tensor hooks" in str(error):  # torch.utils.checkpoint uses them
        return (
            "it uses activation checkpointing; switch that off in definition.py: it saves memory "
            "in training and changes no gradient"
        )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
