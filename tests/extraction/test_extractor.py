"""What the extractor refuses on a GPU. It looks at the losses there after all batches."""

import numpy as np
import pytest
import torch

from influence_cli.cli.opening import open_shared
from influence_cli.cli.options import Shared
from influence_cli.errors import GradientError
from tests.conftest import DEFINITION

BROKEN_LOSS = """
def loss(model, batch):
    losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return torch.where(batch[0][:, 0] == train_data()[13][0][0], torch.nan, losses)
"""


@pytest.mark.parametrize("way", ["rows", "visit"])
def test_a_loss_that_is_not_finite_is_refused_after_the_last_batch_of_a_gpu(way, make_run):
    run = make_run(definition=DEFINITION + BROKEN_LOSS)
    opened = open_shared(Shared(run=run, cache="none", quiet=True, batch_size="5"))
    extractor, columns = opened.gradients.extractor, list(opened.columns)
    extractor.device = torch.device("cuda")  # the model and the batches stay on the CPU
    request = opened.checkpoints[0], "train", columns, np.arange(20)
    sizes = []
    with pytest.raises(GradientError, match=r"the loss is not finite at .*, example 13 of train"):
        if way == "rows":
            extractor.rows_at(*request, advance=lambda count, where: sizes.append(count))
        else:
            extractor.visit_at(*request, lambda name, form: 0, lambda batch: sizes.append(5))
    assert sizes == [5] * 4
