"""The critic: tells true pictures from made ones, patch by patch, so that who makes them draws edges and does not blur.

A decoder that only minimises its error draws the mean of all pictures that its latents may stand for: skylines melt.
With a critic it draws one of them.

Sources: arXiv 1611.07004 (judging patches), 1705.02894 (hinge loss), 2012.09841 equation 7 (the adaptive weight).
"""
# Calling a torch module is typed as Any.
# mypy: disable-error-code="no-any-return, no-untyped-call"

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

WARM_UP = 100  # steps until the critic has its full say


class Critic(nn.Module):
    """Scores patches of about 30 pixels, high for true ones.

    In every run it gets its say little by little, also where one goes on.

    Args:
        channels: of a picture; several frames may lie in one.
    """

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, 32, 3, padding=1), nn.LeakyReLU(0.2)]
        for before, after in ((32, 48), (48, 96)):
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.GroupNorm(8, after), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(96, 96, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(96, 1, 3, padding=1)]
        self.layers = nn.Sequential(*layers)
        self.steps = 0

    def forward(self, pictures: Tensor) -> Tensor:
        """Score pictures [N, C, H, W]: [N, 1, h, w]."""
        return self.layers(pictures)

    def loss(self, error: Tensor, made: Tensor, true: Tensor, last: Tensor, share: float = 0.5) -> Tensor:
        """Return one loss for a network and its critic: the error, what fools the critic, what the critic must learn.

        The first two have no gradient for the critic and the last none for the network, so one optimizer serves both.
        Fooling counts so much that it pulls `share` times as hard as the error does, at the network's last layer.

        Args:
            error: of the network, a scalar.
            made: pictures [N, C, H, W] with the network's gradient.
            true: true ones, of the same shape.
            last: weight of the network's last layer.
            share: pull of the critic.
        """
        frozen = {name: value.detach() for name, value in self.named_parameters()}
        fooling = -functional_call(self, frozen, (made,)).mean()
        pull, push = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (error, fooling))
        self.steps += 1
        weight = min(1.0, self.steps / WARM_UP) * share * (pull / (push + 1e-6)).clamp(max=1e3).detach()
        telling = functional.relu(1 - self(true)).mean() + functional.relu(1 + self(made.detach())).mean()
        return error + weight * fooling + telling
