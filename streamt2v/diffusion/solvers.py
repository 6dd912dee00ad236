"""One step of each sampler: tensors in, tensors out. The network, the noise and all state are the caller's."""

import math

from torch import Tensor


def ddim_step(
    clean: Tensor,
    epsilon: Tensor,
    alpha_bar: Tensor | float,
    alpha_bar_next: Tensor | float,
    eta: float = 0.0,
    noise: Tensor | None = None,
) -> Tensor:
    """Take one DDIM step from signal level alpha_bar to alpha_bar_next.

    sigma = eta sqrt((1 - b) / (1 - a) (1 - a / b));  x' = sqrt(b) x_0 + sqrt(1 - b - sigma^2) eps + sigma z
    with a = alpha_bar and b = alpha_bar_next. The last step of the published sampler adds noise too, since b < 1 there;
    pass eta = 0 for it to leave that noise out.

    Args:
        clean: estimate of x_0.
        epsilon: estimate of the noise in x.
        alpha_bar, alpha_bar_next: in [0, 1], the second larger.
        eta: share of fresh noise, 0 (deterministic) to 1 (DDPM).
        noise: z, unit normal; needed when eta > 0.

    Source: arXiv 2010.02502 equation 12.
    """
    a, b = float(alpha_bar), float(alpha_bar_next)
    sigma = eta * math.sqrt(max((1 - b) / (1 - a) * (1 - a / b), 0.0)) if eta else 0.0
    moved = math.sqrt(b) * clean + math.sqrt(max(1 - b - sigma**2, 0.0)) * epsilon
    if not sigma:
        return moved
    if noise is None:
        raise ValueError("a DDIM step with eta > 0 needs noise")
    return moved + sigma * noise


def euler_step(x: Tensor, clean: Tensor, rho: float, rho_next: float) -> Tensor:
    """Take one Euler step of the probability flow, x' = x + (rho' - rho) (x - D) / rho, where x = x_0 + rho n.

    Args:
        x: latents at rho.
        clean: D, estimate of x_0.
        rho, rho_next: noise levels, the second smaller; at 0 the result is D.

    Source: arXiv 2206.00364 algorithm 1 without its correction.
    """
    return x + (rho_next - rho) / rho * (x - clean)


def dpmpp_2m_step(
    x: Tensor, clean: Tensor, previous: Tensor | None, rho: Tensor, step: int, noise: Tensor | None
) -> Tensor:
    """Take one step of DPM-Solver++(2M), midpoint form, in variance-exploding coordinates x = x_0 + rho n.

    With h = ln(rho_k / rho_{k+1}), D the clean estimates and z unit normal noise:
      ODE (noise None): x' = (rho'/rho) x + (1 - e^-h) (D_k + h / (2 h_{k-1}) (D_k - D_{k-1}))
      SDE (eta 1):      x' = (rho'/rho) e^-h x + (1 - e^-2h) (D_k + h / (2 h_{k-1}) (D_k - D_{k-1}))
                             + rho' sqrt(1 - e^-2h) z
    The bracket is D_k alone at the first step and after one from pure noise (rho infinite); a step to rho' = 0 returns
    D_k.

    Args:
        x: latents at rho[step].
        clean: D_k, estimate of x_0.
        previous: D_{k-1} of the step before, None at the first one.
        rho: noise levels [N+1], descending, the last may be 0.
        step: k.
        noise: z for the SDE, None for the ODE.

    Source: arXiv 2211.01095 algorithm 2, SDE form section 5 of its appendix.
    """
    level, level_next = float(rho[step]), float(rho[step + 1])
    if level_next == 0:
        return clean
    h = math.log(level / level_next)
    extrapolated = clean
    # A very low start level can repeat itself in the grid.
    if previous is not None and math.inf > (level_before := float(rho[step - 1])) > level:
        extrapolated = clean + 0.5 * h / math.log(level_before / level) * (clean - previous)
    if noise is None:
        return level_next / level * x - math.expm1(-h) * extrapolated
    e = -math.expm1(-2 * h)
    return level_next / level * math.exp(-h) * x + e * extrapolated + level_next * math.sqrt(e) * noise


def flow_step(x: Tensor, clean: Tensor, previous: Tensor | None, sigmas: Tensor, step: int) -> Tensor:
    """Take one step of DPM-Solver++(2M) where x = (1 - sigma) x_0 + sigma n, as in flow matching.

    x / (1 - sigma) = x_0 + rho n with rho = sigma / (1 - sigma) are the coordinates of `dpmpp_2m_step`. Without a
    previous estimate this is the Euler step x + (sigma' - sigma) v with v = (x - x_0) / sigma.

    Args:
        x: latents at sigmas[step].
        clean: estimate of x_0.
        previous: that of the step before, None at the first one.
        sigmas: noise levels [N+1] below 1, descending, the last may be 0.
        step: k.
    """
    share = 1 - sigmas
    return dpmpp_2m_step(x / share[step], clean, previous, sigmas / share, step, None) * share[step + 1]
