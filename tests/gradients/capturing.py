"""A case captured beside its reference, and what it means that they are equal."""

import torch
from torch import nn

from influence_cli.gradients.batches import to
from influence_cli.gradients.capture import Capture
from influence_cli.gradients.forms import Form
from tests import reference
from tests.cases import Case


def captured(
    case: Case,
    dtype: torch.dtype = torch.float64,
    at_once: bool | None = None,
    hooked: tuple[str, ...] | None = None,
):
    """(result, reference gradients, capture, notes); `at_once` and `hooked` overrule what the probe
    settled.
    """
    torch.manual_seed(0)
    device = torch.device("cpu")
    model = case.model().to(dtype).eval()
    items, notes = case.examples(), []
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    embeddings = [
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
    ]

    def batch(chosen):
        return to(case.collate(chosen), device, dtype)

    capture = Capture(model, case.loss, names, embeddings, note=notes.append)
    capture.probe(batch(items[:2]), [batch([item]) for item in items[:2]])
    capture.at_once = capture.at_once if at_once is None else at_once
    capture.hooked = capture.hooked if hooked is None else hooked
    result = capture(batch(items), lambda i: batch([items[i]]), len(items))
    singles = [to(case.collate([item]), device, torch.float64) for item in items]
    return result, reference.gradients(model.double(), case.loss, singles), capture, notes


def assert_equal(forms: dict[str, Form], expected: dict[str, torch.Tensor]) -> None:
    """1e-9 of each parameter's gradients; of a thousandth of the whole where those are only
    rounding (a key's bias before softmax).
    """
    assert set(forms) == set(expected)
    total_norm = reference.flat(expected).norm()
    for name, value in expected.items():
        rows = value.reshape(len(value), -1)
        assert (forms[name].dense().values - rows).norm() <= 1e-9 * max(
            float(rows.norm()), 1e-3 * float(total_norm)
        ), name
