"""What makes gradients meaningless, found on the first examples of a run."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from influence_cli.errors import GradientError, listed
from influence_cli.gradients.autograd_gradients import LossesAndGradients
from influence_cli.gradients.batches import Batch
from influence_cli.gradients.tolerances import close, differing


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


def random_quantity(subject: str, first: float, second: float) -> GradientError:
    return GradientError(
        f"{subject} is random: {first:.6g} at first, {second:.6g} when computed again",
        "expected: the same loss and gradient each time",
        "look for functional dropout (F.dropout needs training=self.training), noise or sampling",
    )
