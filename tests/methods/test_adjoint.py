"""The adjoint of an optimizer's step: by hand, against retraining, and against whole Jacobians."""

from dataclasses import dataclass

import pytest
import torch

from influence_cli.gradients.forms import Dense, Factors
from influence_cli.methods.reverse.fisher_batch import FisherBatch, weighted_gram
from influence_cli.methods.reverse.optimizer_adjoint import Adjoint, SgdUpdate
from influence_cli.methods.reverse.removal_effects import removal_effects, sum_parameters
from influence_cli.methods.reverse.stability import top_eigenvalue
from tests import reference


def dense(values):
    return {"w": Dense((values.shape[1],), values)}


def test_the_example_by_hand_to_the_last_digit():
    """½ squared loss, one weight, sum loss, rate 0.05: E(a) = -0.05 and score -0.0075.

    By the empirical Fisher E(a) = -0.0806.
    """
    double = {"dtype": torch.float64}
    g1, h1, g0 = (
        torch.tensor([[-0.8], [1.8]], **double),
        torch.tensor([[1.0], [3.0]], **double),
        torch.tensor([[-2.0], [-2.0]], **double),
    )
    one, update = torch.ones(2, **double), {"w": SgdUpdate(0.05)}
    for curvature, embedding in ((h1, -0.05), (g1, -0.0806)):
        adjoint = Adjoint({"w": torch.ones(1, 1, **double)}, {})
        adjoint.reverse_step(FisherBatch(dense(g1), one, dense(curvature)), update)
        actual = removal_effects(
            sum_parameters(adjoint.reverse_step(FisherBatch(dense(g0), one, dense(g0)), update)),
            one,
        )
        assert float(actual[0, 0]) == pytest.approx(embedding, abs=1e-16)
        assert float(actual[0, 0]) * 0.15 == pytest.approx(embedding * 0.15, abs=1e-16)


# ------------------------------------------------ linear regression: exactly what retraining does
@dataclass(frozen=True)
class Setting:
    momentum: float = 0.0
    decay: float = 0.0
    nesterov: bool = False
    mean: bool = True
    renormalized: bool = False
    repeated: bool = False


SETTINGS = {
    "sum": Setting(mean=False),
    "mean": Setting(),
    "renormalised mean": Setting(renormalized=True),
    "renormalised mean, an example twice in a step": Setting(renormalized=True, repeated=True),
    "an example twice in a step": Setting(repeated=True),
    "weight decay": Setting(decay=0.1),
    "momentum": Setting(momentum=0.9),
    "momentum and weight decay": Setting(momentum=0.9, decay=0.1),
    "nesterov": Setting(momentum=0.9, nesterov=True),
    "nesterov and weight decay": Setting(momentum=0.9, nesterov=True, decay=0.1),
    "renormalised nesterov, weight decay": Setting(
        momentum=0.8, nesterov=True, decay=0.1, renormalized=True
    ),
}


def regression(setting, dropped=None):
    """Train with torch's SGD: parameters at the end, and per step (G, h, w, rate).

    The losses are ½ squares. `dropped`: (step, example).
    """
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.randn(30, *shape, generator=generator, dtype=torch.float64) for shape in ((5,), ())
    )
    theta = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    optimizer = torch.optim.SGD(
        [theta], 0.1, setting.momentum, weight_decay=setting.decay, nesterov=setting.nesterov
    )
    steps, order = [], torch.Generator().manual_seed(1)
    for t in range(12):
        batch = torch.randperm(30, generator=order)[:6]
        if setting.repeated:
            batch[3] = batch[0]
        rate = 0.1 / (1 + t / 6) if setting.mean else 0.02
        w = torch.full((6,), 1 / 6 if setting.mean else 1.0, dtype=torch.float64)
        kept = (
            torch.ones(6, dtype=torch.bool)
            if dropped is None or dropped[0] != t
            else batch != dropped[1]
        )
        if setting.renormalized:
            w = w / w[kept].sum()
        residual = x[batch] @ theta.detach() - y[batch]
        steps.append((batch, residual[:, None] * x[batch], x[batch], w, rate))
        theta.grad = (w[kept] * residual[kept]) @ x[batch][kept]
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    return theta.detach().clone(), steps


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_with_the_exact_curvature_the_embedding_is_the_parameters_change_of_retraining(setting):
    end, steps = regression(setting)
    adjoint = Adjoint(
        {"w": torch.eye(5, dtype=torch.float64)},
        {"w": torch.zeros(5, 5, dtype=torch.float64)} if setting.momentum else {},
    )
    for t in reversed(range(12)):
        batch, gradients, factors, w, rate = steps[t]
        update = {"w": SgdUpdate(rate, setting.momentum, setting.decay, setting.nesterov)}
        entry_of = torch.unique(batch, return_inverse=True)[1] if setting.renormalized else None
        actual = removal_effects(
            sum_parameters(
                adjoint.reverse_step(FisherBatch(dense(gradients), w, dense(factors)), update)
            ),
            w,
            entry_of,
        )
        for example in batch.tolist():
            change = regression(setting, (t, example))[0] - end
            assert (actual[batch == example].sum(0) - change).abs().max() < 1e-10


def test_an_example_that_is_the_whole_batch_takes_the_step_with_it():
    products, w = torch.tensor([[3.0]]), torch.tensor([1.0])
    assert removal_effects(products, w, torch.tensor([0])).tolist() == [[-3.0]]


# ---------------------------------------------------------------- anything: whole Jacobians
@pytest.mark.parametrize("clip", [1.0, 0.6])
@pytest.mark.parametrize("curved", [True, False], ids=["fisher", "none"])
@pytest.mark.parametrize(
    ("momentum", "decay", "nesterov"),
    [(0, 0, False), (0, 0.2, False), (0.9, 0.2, False), (0.9, 0.2, True)],
)
def test_steps_back_are_the_transposed_jacobians_of_the_optimizers_step(
    momentum, decay, nesterov, curved, clip
):
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    query, steps = random(3, 12), []
    for t in range(5):
        left, right = random(4, 2, 3), random(4, 2, 4)
        steps.append((left, right, random(4).abs() / 4, 0.1 / (1 + t), clip if t % 2 else 1.0))
    dense_gradients = [
        Factors((3, 4), left, right).dense().values for left, right, _, _, _ in steps
    ]
    expected = reference.left_out(
        [(G, G, w, rate, s) for G, (_, _, w, rate, s) in zip(dense_gradients, steps, strict=True)],
        query,
        momentum,
        decay,
        nesterov,
        curved,
    )
    adjoint = Adjoint({"w": query.clone()}, {"w": torch.zeros_like(query)} if momentum else {})
    for t in reversed(range(5)):
        left, right, w, rate, s = steps[t]
        batch = {"w": Factors((3, 4), left, right)}
        actual = removal_effects(
            adjoint.reverse_step(
                FisherBatch(batch, w, batch if curved else None),
                {"w": SgdUpdate(rate, momentum, decay, nesterov)},
                s,
            )["w"],
            w,
        )
        assert (actual - expected[t]).abs().max() < 1e-12 * expected[t].abs().max()


def test_the_largest_eigenvalue_of_a_steps_curvature_is_that_of_the_gram_matrix():
    generator = torch.Generator().manual_seed(0)
    G, H = (torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    w = torch.rand(6, generator=generator, dtype=torch.float64)
    rates = {"a": 0.1, "b": 0.3}
    scaled = torch.cat([0.1**0.5 * G, 0.3**0.5 * H], dim=1) * w.sqrt()[:, None]
    gram = weighted_gram(
        {"a": Dense((4,), G), "b": Dense((4,), H)},
        w,
        {name: SgdUpdate(rate) for name, rate in rates.items()},
    )
    assert top_eigenvalue(gram) == pytest.approx(
        float(torch.linalg.eigvalsh(scaled.T @ scaled)[-1]), rel=1e-5
    )


@pytest.mark.parametrize(
    "update",
    [SgdUpdate(0.1), SgdUpdate(0.1, 0.9), SgdUpdate(0.1, 0.9, nesterov=True)],
    ids=["sgd", "momentum", "nesterov"],
)
def test_past_the_limit_steps_grow_and_before_it_they_shrink(update):
    for share, grows in ((0.98, False), (1.02, True)):
        curvature = share * update.stable / update.rate
        theta, m = 1.0, 0.0
        for _ in range(2000):
            g = curvature * theta
            m = update.momentum * m + g
            theta -= update.rate * (g + update.momentum * m if update.nesterov else m)
        assert (abs(theta) > 1) == grows
