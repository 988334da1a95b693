"""The slow reference: float64, plain autograd, one example at a time, straight from the formulas. Shares no code with the fast paths."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def gradients(
    model: nn.Module, quantity: Callable[[nn.Module, Any], Tensor], singles: Sequence[Any]
) -> dict[str, Tensor]:
    """Per trained parameter an (N, *shape) tensor: autograd at a batch of one, N times; zeros where the loss does not reach."""
    model.eval()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for single in singles:
        found = torch.autograd.grad(
            quantity(model, single).sum(), list(parameters.values()), allow_unused=True
        )
        for (name, parameter), gradient in zip(parameters.items(), found, strict=True):
            rows[name].append(
                torch.zeros_like(parameter)
                if gradient is None
                else gradient.to_dense()
                if gradient.is_sparse
                else gradient
            )
    return {name: torch.stack(values) for name, values in rows.items()}


def words(
    model: nn.Module,
    quantity: Callable[[nn.Module, Any], Tensor],
    singles: Sequence[Any],
    module: nn.Embedding,
) -> Tensor:
    """(N, V, d): for each token the sum over its positions of the gradient at the embedding's output; padding_idx has none."""
    rows = torch.zeros(len(singles), *module.weight.shape, dtype=torch.float64)
    for n, single in enumerate(singles):
        calls: list[tuple[Tensor, Tensor]] = []

        def keep(
            _: nn.Module,
            args: tuple[Tensor],
            output: Tensor,
            calls: list[tuple[Tensor, Tensor]] = calls,
        ) -> None:
            output.retain_grad()
            calls.append((args[0], output))

        hook = module.register_forward_hook(keep)
        quantity(model, single).sum().backward()
        hook.remove()
        for ids, output in calls:
            assert output.grad is not None
            for token, gradient in zip(
                ids.flatten().tolist(), output.grad.reshape(-1, output.shape[-1]), strict=True
            ):
                if token != module.padding_idx:
                    rows[n, token] += gradient
    return rows


def flat(grads: dict[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    """(N, all numbers), of the parameters `names` or all."""
    return torch.cat(
        [
            value.reshape(len(value), -1)
            for name, value in grads.items()
            if names is None or name in names
        ],
        dim=1,
    )


def tracin(
    train: Sequence[Tensor],
    query: Sequence[Tensor],
    rates: Sequence[float],
    normalize: bool = False,
) -> Tensor:
    """(Q, N): sum over checkpoints of rate x query gradients x train gradients; cosines with `normalize`."""
    total = torch.zeros(len(query[0]), len(train[0]), dtype=torch.float64)
    for g, q, rate in zip(train, query, rates, strict=True):
        if normalize:
            g, q = g / g.norm(dim=1, keepdim=True), q / q.norm(dim=1, keepdim=True)
        total += rate * (q @ g.T)
    return total


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest deviation relative to the largest value."""
    return float((found.double() - expected).abs().max() / expected.abs().max())


def left_out(
    step_gradients: Sequence[tuple[Tensor, Tensor, Tensor, float | Tensor, float]],
    query: Tensor,
    momentum: float | Tensor = 0.0,
    decay: float | Tensor = 0.0,
    nesterov: bool | Tensor = False,
    curved: bool = True,
    source: Tensor | float = 1.0,
) -> list[Tensor]:
    """Per step (B, Q): what leaving each entry out does to the queries' losses at the end, to first order, by each step's whole Jacobian.

    `step_gradients`: per step (G (B, p), h (B, p), w (B,), rate, clip); `query` (Q, p) at the end. Rate, momentum, decay and nesterov are
    one or one for each of the p numbers. State: parameters and buffer, 2p x 2p. `source`: of the entry's own gradient these numbers count.
    """
    p = query.shape[1]
    eye, zero = torch.eye(p, dtype=torch.float64), torch.zeros(p, p, dtype=torch.float64)
    M, D, N = (
        torch.diag(value * torch.ones(p, dtype=torch.float64))
        for value in (momentum, decay, nesterov)
    )
    after = torch.cat(
        [query, torch.zeros_like(query)], dim=1
    )  # (Q, 2p): derivative of the queries by the state after the step
    found: list[Tensor] = []
    for G, h, w, rate, clip in reversed(step_gradients):
        batch, R = w @ G, torch.diag(rate * torch.ones(p, dtype=torch.float64))
        clipped = (
            clip * (eye - torch.outer(batch, batch) / batch.square().sum()) if clip != 1 else eye
        )  # d(clipped gradient) / d(gradient)
        H = h.T @ (w[:, None] * h) if curved else zero
        m_theta, m_m = clipped @ H + D, M  # m' = M m + gradient + D theta
        theta_theta, theta_m = (
            eye - R @ (eye + N @ M) @ m_theta,
            -R @ (eye - N + N @ M) @ M,
        )  # theta' = theta - R (m', or N: gradient + M m')
        by_theta, by_m = after[:, :p], after[:, p:]
        by_g = (-by_theta @ R @ (eye + N @ M) + by_m) @ clipped
        found.append(-w[:, None] * (G @ (by_g * source).T))
        after = torch.cat(
            [by_theta @ theta_theta + by_m @ m_theta, by_theta @ theta_m + by_m @ m_m], dim=1
        )
    return found[::-1]
