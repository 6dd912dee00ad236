"""The critic: one loss for two networks that learn opposite things, and edges where an error alone leaves a blur."""

import torch
from torch import nn

from streamt2v.training.critic import WARM_UP, Critic


def drawing(seed: int, count: int = 8) -> torch.Tensor:
    """Vertical edges, each a little left or a little right of the middle."""
    left = torch.rand(count, generator=torch.Generator().manual_seed(seed)) < 0.5
    return torch.where(torch.arange(16) < torch.where(left, 6, 10)[:, None], -1.0, 1.0)[:, None, None].expand(
        -1, 3, 16, -1
    )


def test_each_network_has_the_gradient_of_its_own_part() -> None:
    torch.manual_seed(0)
    critic, maker = Critic(), nn.Conv2d(3, 3, 1)
    critic.steps = WARM_UP - 1
    true = drawing(0)
    made = maker(true.flip(-1))
    error = (made - true).square().mean()
    alone = torch.autograd.grad(error, maker.weight, retain_graph=True)[0]
    critic.loss(error, made, true, maker.weight, share=0.5).backward()
    assert maker.weight.grad is not None
    fooling = maker.weight.grad - alone
    torch.testing.assert_close(fooling.norm(), 0.5 * alone.norm(), rtol=1e-3, atol=0)

    own = [p.grad for p in critic.parameters()]
    critic.zero_grad()
    telling = nn.functional.relu(1 - critic(true)).mean() + nn.functional.relu(1 + critic(made.detach())).mean()
    telling.backward()
    for found, parameter in zip(own, critic.parameters(), strict=True):
        torch.testing.assert_close(found, parameter.grad)


def test_a_picture_that_cannot_be_known_is_drawn_and_not_averaged() -> None:
    """Two edges are equally likely: the least error is a grey bar between them, which no true picture has."""

    def grey(share: float) -> float:
        torch.manual_seed(0)
        critic, picture = Critic(), nn.Parameter(torch.zeros(1, 1, 1, 16))
        shade = nn.Parameter(torch.ones(1, 3, 1, 1))
        optimizer = torch.optim.Adam(
            [{"params": [picture, shade], "lr": 0.03}, {"params": critic.parameters(), "lr": 1e-3}]
        )
        for step in range(150):
            true, made = drawing(step), (picture * shade).expand(8, -1, 16, -1)
            error = (made - true).square().mean()
            optimizer.zero_grad()
            (critic.loss(error, made, true, shade, share) if share else error).backward()
            optimizer.step()
        return float((picture * shade)[..., 6:10].detach().abs().mean())

    assert grey(0.0) < 0.3
    assert grey(3.0) > 0.6
