"""Muon: momentum whose matrix updates are orthogonalised, so that few steps go far; Adam for everything else.

Weights of one shape are orthogonalised together: a network of five hundred small matrices is then a few dozen products.

Source: Jordan et al. 2024 (Muon); Liu et al. 2025, arXiv 2502.16982, for the scale 0.2 sqrt(max(rows, columns)) that
makes one learning rate serve both kinds of parameter.
"""
# The libraries' modules are typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

MOMENTUM, BETAS = 0.95, (0.9, 0.99)  # of the matrix rule; Adam's averages
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Push the singular values of matrices [..., rows, columns] towards one by a quintic Newton-Schulz iteration."""
    a, b, c = _NEWTON_SCHULZ
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
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
            given = [p for p in group["params"] if p.grad is not None]
            matrices: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in given:
                if not group["adam"] and parameter.dim() >= 2:
                    matrices[parameter.flatten(1).shape].append(parameter)
            for alike in matrices.values():
                self._muon(alike, group["lr"])
            if others := [p for p in given if group["adam"] or p.dim() < 2]:
                self._adam(others, group["lr"])

    def _muon(self, parameters: list[Tensor], rate: float) -> None:
        """Update parameters of one flattened shape."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        averages = [self.state[p].setdefault("average", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - MOMENTUM)
        pairs = zip(gradients, averages, strict=True)
        directions = torch.stack([gradient.lerp(average, MOMENTUM).flatten(1) for gradient, average in pairs])
        scale = 0.2 * max(directions.shape[1:]) ** 0.5
        for parameter, update in zip(parameters, orthogonalise(directions), strict=True):
            parameter.sub_(update.view_as(parameter), alpha=rate * scale)

    def _adam(self, parameters: list[Tensor], rate: float) -> None:
        first, second = BETAS
        for parameter in parameters:
            state, grad = self.state[parameter], parameter.grad
            assert grad is not None
            mean = state.setdefault("mean", torch.zeros_like(grad))
            square = state.setdefault("square", torch.zeros_like(grad))
            state["count"] = count = state.get("count", 0) + 1
            mean.lerp_(grad, 1 - first)
            square.lerp_(grad.square(), 1 - second)
            scale = (square / (1 - second**count)).sqrt_().add_(1e-8)
            parameter.addcdiv_(mean / (1 - first**count), scale, value=-rate)
