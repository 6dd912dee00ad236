"""Muon: momentum whose matrix updates are orthogonalised, so that few steps go far; Adam for everything else.

Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982, for the scale 0.2 sqrt(max(rows, columns)) that
makes one learning rate serve both kinds of parameter.
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, BETAS = 0.95, (0.9, 0.99)  # of the matrix rule; Adam's averages
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of [rows, columns] towards one by a quintic Newton-Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon on weights with two or more axes (flattened to [out, rest]), Adam on vectors, embeddings and scalars.

    Args:
        params: parameter groups; a group may carry "adam": True to use Adam for all of its tensors.
        lr: learning rate of both rules.
    """

    def __init__(self, params: Iterable[Tensor] | Iterable[dict[str, Any]], lr: float) -> None:
        super().__init__(params, {"lr": lr, "adam": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["adam"] or parameter.dim() < 2:
                    self._adam(parameter, group)
                else:
                    self._muon(parameter, group)

    def _muon(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        average = state.setdefault("average", torch.zeros_like(grad))
        average.lerp_(grad, 1 - MOMENTUM)
        direction = grad.lerp(average, MOMENTUM).flatten(1)
        rows, columns = direction.shape
        update = orthogonalise(direction).view_as(grad) * (0.2 * max(rows, columns) ** 0.5)
        parameter.sub_(update, alpha=group["lr"])

    def _adam(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        first, second = BETAS
        mean = state.setdefault("mean", torch.zeros_like(grad))
        square = state.setdefault("square", torch.zeros_like(grad))
        state["count"] = count = state.get("count", 0) + 1
        mean.lerp_(grad, 1 - first)
        square.lerp_(grad.square(), 1 - second)
        scale = (square / (1 - second**count)).sqrt_().add_(1e-8)
        parameter.addcdiv_(mean / (1 - first**count), scale, value=-group["lr"])
