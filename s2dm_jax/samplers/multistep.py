"""Exponential integrators with a history: DEIS, DPM-Solver++ and UniPC.

The history is part of the scan's state. A step that does not have enough of it yet, or must not use it, is not a
branch: its coefficients are those of a lower order. The last step is always a DDIM step, whose result is the network's
prediction of x_0 at the lowest timestep.
"""

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.parameterization import predict_x0
from s2dm_jax.diffusion.schedule import NoiseSchedule, alpha_sigma, log_alpha_bar
from s2dm_jax.diffusion.types import EpsFn, SamplerOutput
from s2dm_jax.samplers.common import call_network, check_concrete_options, scan_sampler, timestep_pairs, weighted_sum
from s2dm_jax.samplers.thresholding import with_thresholding

# Gauss-Legendre quadrature moved from [−1, 1] to [0, 1]; all its weights are positive.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)
_NODES, _WEIGHTS = (_NODES + 1) / 2, _WEIGHTS / 2
# Fewer than these, and DPM-Solver++(3M) ends with lower orders (`lower_order_final` of diffusers).
_FEW_STEPS = 15
# A step of DEIS in t, in units of the one before, beyond which it does not extrapolate.
_LONGEST_EXTRAPOLATION = 2


@with_thresholding
def deis(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    order: int = 3,
    return_x0: bool = False,
) -> SamplerOutput:
    """DEIS tAB (Zhang & Chen 2023, eq. 14, 15); NFE S. Contract: `s2dm_jax.samplers`.

    ε is extrapolated as a polynomial in t through the last `order` evaluations and integrated against the
    probability-flow ODE. The first steps have the order that their history allows; the last one, and one that is more
    than twice as long in t as the one before, are DDIM steps.

    Args:
      order: evaluations that a step combines, 1 (this is DDIM) to 3; the polynomial's degree is one less.
    """
    check_concrete_options("deis", order=order)
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, s, x_T.dtype) for s in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, _ = alpha_sigma(log_ab_next)
    weights = _deis_weights(schedule, t, t_next, log_ab, log_ab_next, order)  # [S, order]

    def step(state, inputs):
        x, history = state
        t, signal, sigma, signal_next, weights = inputs
        eps = call_network(eps_fn, x, t)
        slopes = jnp.concatenate([eps[None], history])  # [order, B, H, W, C]
        # x/signal moves by the integral of ε over sigma/signal.
        x_next = signal_next * (x / signal + weighted_sum(weights, slopes))
        return (x_next, slopes[:-1]), predict_x0(x, eps, signal, sigma)

    history = jnp.zeros((order - 1, *x_T.shape), x_T.dtype)  # [order - 1, B, H, W, C]
    return scan_sampler(step, (x_T, history), (t, signal, sigma, signal_next, weights), return_x0)


def _deis_weights(schedule, t, t_next, log_ab, log_ab_next, order):
    """[S, order]: each Lagrange polynomial in t integrated over ρ = sigma/signal, newest evaluation first."""
    dtype = log_ab.dtype
    rho, rho_next = jnp.sqrt(jnp.expm1(-log_ab)), jnp.sqrt(jnp.expm1(-log_ab_next))
    # In ρ the ODE is d(x/signal) = ε dρ: quadrature points in ρ, and the fractional timesteps they belong to.
    rho_q = rho[:, None] + (rho_next - rho)[:, None] * jnp.asarray(_NODES, dtype)  # [S, Q]
    all_t = jnp.arange(-1, schedule.T, dtype=dtype)  # [T + 1], from the clean image
    t_q = jnp.interp(jnp.log1p(rho_q**2), jnp.asarray(-schedule.log_alpha_bar_with_x0, dtype), all_t)

    # Evaluations that exist already; the newest alone in the last step, and in one that is far longer than the one
    # before: a polynomial would multiply the network's error there.
    step, age = jnp.arange(len(t))[:, None], jnp.arange(order)
    looks_back = (t_next >= 0) & (t - t_next <= _LONGEST_EXTRAPOLATION * (jnp.roll(t, 1) - t))
    used = (age <= step) & (looks_back[:, None] | (age == 0))  # [S, order]
    node = t.astype(dtype)[jnp.maximum(step - age, 0)]  # [S, order]
    # Axes: step, evaluation whose polynomial it is, evaluation where that is 0, quadrature point.
    pairs = used[:, :, None] & used[:, None, :] & ~jnp.eye(order, dtype=bool)  # [S, order, order]
    distance = jnp.where(pairs, node[:, :, None] - node[:, None, :], 1)
    factors = (t_q[:, None, None, :] - node[:, None, :, None]) / distance[..., None]  # [S, order, order, Q]
    lagrange = jnp.prod(jnp.where(pairs[..., None], factors, 1), axis=2)  # [S, order, Q]
    mean = jnp.sum(lagrange * jnp.asarray(_WEIGHTS, dtype), axis=-1)  # [S, order]
    return jnp.where(used, mean, 0) * (rho_next - rho)[:, None]


@with_thresholding
def dpmpp(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    order: int = 2,
    return_x0: bool = False,
) -> SamplerOutput:
    """DPM-Solver++, multistep (Lu et al. 2022, section 4, algorithm 2); NFE S. Contract: `s2dm_jax.samplers`.

    The prediction of x_0 is extrapolated in the half-log-SNR λ: as a constant (order 1, which is DDIM), a line or a
    parabola. The first steps have the order that their history allows. The last one, where λ is infinite, must not look
    back: it is a DDIM step.

    Args:
      order: predictions that a step combines, 1 to 3. Order 2 takes the line half a step ahead, as in the paper.
        Order 3 integrates the parabola exactly; the released code's coefficient of the second difference is half of
        that, which is of order 2; with fewer than 15 steps the one before the last has order 2.
    """
    check_concrete_options("dpmpp", order=order)
    t, signal, sigma, decay, gain, h, growth = _log_snr_steps(schedule, timesteps, x_T.dtype)
    weights = _parabola_weights(h, growth) if order == 3 else growth / 2

    def step(state, inputs):
        x, x0_before, difference_before = state
        t, signal, sigma, decay, gain, weights = inputs
        x0 = predict_x0(x, call_network(eps_fn, x, t), signal, sigma)
        difference = x0 - x0_before
        mean = x0
        if order == 2:
            mean = x0 + weights * difference
        elif order == 3:
            mean_u, second, growth, growth_before = weights
            slope = growth * difference
            mean = x0 + mean_u * slope + second * (slope - growth_before * difference_before)
        return (decay * x + gain * mean, x0, difference), x0

    zeros = jnp.zeros_like(x_T)
    return scan_sampler(step, (x_T, zeros, zeros), (t, signal, sigma, decay, gain, weights), return_x0)


@with_thresholding
def dpmpp_2m(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    return_x0: bool = False,
) -> SamplerOutput:
    """DPM-Solver++(2M), `dpmpp` of order 2 (Lu et al. 2022, algorithm 2); NFE S. Contract: `s2dm_jax.samplers`."""
    return dpmpp(eps_fn, x_T, schedule, timesteps, order=2, return_x0=return_x0)


@with_thresholding
def dpmpp_3m(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    return_x0: bool = False,
) -> SamplerOutput:
    """DPM-Solver++(3M), `dpmpp` of order 3 (Lu et al. 2022, section 4); NFE S. Contract: `s2dm_jax.samplers`."""
    return dpmpp(eps_fn, x_T, schedule, timesteps, order=3, return_x0=return_x0)


def _parabola_weights(h, growth):
    """Arrays [S] that make the weighted mean, over a step, of the parabola through the last three x_0:
    x_0 + mean_u·slope + second·(slope − growth_before·difference_before), slope = growth·difference.
    """
    # x_0 = newest + u·first + u·(u + 1/growth)·second, u = 0 … 1 in the step, with divided differences in u.
    two_before = jnp.roll(h, 2)
    index = jnp.arange(len(h))
    # With few steps order 2 in the one before the last, which is by far the longest in λ, as in diffusers.
    has_two = (index >= 2) & (index < len(h) - (2 if len(h) < _FEW_STEPS else 1))
    mean_u, mean_u2 = (jnp.where(growth > 0, mean, 0) for mean in _weighted_means(h, 2))
    growth_before = jnp.where(has_two, h / two_before, 0)
    before = jnp.where(growth > 0, 1 / jnp.where(growth > 0, growth, 1), 0)  # The step before in units of this one.
    span = jnp.where(has_two, before + two_before / h, 1)
    second = jnp.where(has_two, (mean_u * before + mean_u2) / span, 0)
    return mean_u, second, growth, growth_before


@with_thresholding
def unipc(
    eps_fn: EpsFn,
    x_T: jax.Array,
    schedule: NoiseSchedule,
    timesteps: jax.Array | np.ndarray,
    *,
    order: int = 2,
    variant: str = "bh2",
    return_x0: bool = False,
) -> SamplerOutput:
    """UniPC (Zhao et al. 2023, algorithms 5 to 8: multistep UniP-p and UniC-p that predict x_0); NFE S. Contract:
    `s2dm_jax.samplers`.

    Each prediction of x_0 corrects the step that led to it, then serves to predict the next one. The first and the last
    steps have lower orders, as in the released code: the first ones those that their history allows, the last one is a
    DDIM step that is not corrected, and order 3 has order 2 in the one before.

    Args:
      order: p of UniP-p and UniC-p, 1 to 3: predictions of x_0 that the predictor combines.
      variant: B(h) of the paper: "bh1" is h, "bh2" e^h − 1. It matters where the paper has no order conditions to
        solve: in UniP-2 and in UniC-1, so that order 3 depends on it in its lower orders alone.
    """
    check_concrete_options("unipc", order=order, variant=variant)
    t, signal, sigma, decay, gain, h, growth = _log_snr_steps(schedule, timesteps, x_T.dtype)
    rates, predictor, corrector = _unipc_weights(h, growth, order, variant)
    # At timestep i the step from i−1 is corrected; into the first timestep there was none, from the last there is none.
    zero = jnp.zeros(1, x_T.dtype)
    predictor = [jnp.append(weight, zero) for weight in predictor]
    corrector = [jnp.append(zero, gain[:-1] * weight) for weight in corrector]

    def step(state, inputs):
        x, first_order, slopes, history = state
        t, signal, sigma, decay, gain, rates, predictor, corrector = inputs
        x0 = predict_x0(x, call_network(eps_fn, x, t), signal, sigma)
        differences = [x0 - before for before in history]
        # Correct the arrival at this timestep. The network is not called again at the corrected x.
        x = _add_weighted(first_order, corrector, [*slopes, differences[0]])
        # Predict the next timestep.
        slopes = [rate * difference for rate, difference in zip(rates, differences, strict=False)]
        first_order = decay * x + gain * x0
        x_next = _add_weighted(first_order, predictor, [gain * slope for slope in slopes])
        return (x_next, first_order, slopes, [x0, *history[:-1]]), x0

    zeros = jnp.zeros_like(x_T)
    state = (x_T, x_T, [zeros] * (order - 1), [zeros] * max(order - 1, 1))
    return scan_sampler(step, state, (t, signal, sigma, decay, gain, rates, predictor, corrector), return_x0)


def _add_weighted(x, weights, arrays):
    return sum((weight * array for weight, array in zip(weights, arrays, strict=True)), x)


def _unipc_weights(h, growth, order, variant):
    """The weights of UniP's and UniC's slopes in x_0, which `gain` multiplies.

    A slope is a difference of x_0 to the newest one per step: the difference to the k-th before times rates[k − 1].

    Returns:
      rates, order − 1 arrays [S]; the predictor's weights of those slopes, order − 1 arrays [S − 1]; the corrector's
      of the same and of the new evaluation's slope, order arrays [S − 1].
    """
    rates, h, growth = [growth], h[:-1], growth[:-1]
    half = jnp.full_like(h, 0.5) if variant == "bh2" else -h / (2 * jnp.expm1(-h))
    if order == 1:
        return [], [], [half]
    b_1, b_2, b_3 = _weighted_means(h, 3)
    # Solution of the two order conditions of UniC-2. Growth is 0 in the first step alone, whose corrector is UniC-1.
    old = (b_1 - b_2) * growth / (1 + growth)
    new = jnp.where(growth == 0, half, b_1 - old)
    if order == 2:
        return rates, [half], [old, new]
    # UniC-3 adds the third divided difference of x_0, at the points 0, −near, −far and 1 in units of the step, times
    # the mean of θ·(θ + near)·(θ − 1). UniP-3 has the parabola through the first three of them.
    step = jnp.arange(len(h))
    third = (step >= 2) & (step < len(h) - 1)
    near, gap = (jnp.where(third, jnp.roll(h, k) / h, 1) for k in (1, 2))
    far = near + gap
    cubic = jnp.where(third, b_3 - (1 - near) * b_2 - near * b_1, 0)
    corrector = [
        old - cubic / (gap * (1 + near)),
        cubic / (gap * (1 + far)),
        new + cubic / ((1 + near) * (1 + far)),
    ]
    second = jnp.where(third, -(b_2 + near * b_1) / gap, 0)
    rates.append(jnp.append(jnp.where(third, 1 / far, 0), 0))
    return rates, [jnp.where(third, b_1 - second, half), second], corrector


def _log_snr_steps(schedule, timesteps, dtype):
    """Arrays [S] for solvers in λ = log(signal/sigma), whose first-order step is decay·x + gain·x_0.

    They are t, signal, sigma, decay, gain; h, the step in λ (infinite in the last step); and growth, h over the step
    before, 0 where a step must not look back: in the first and in the last.
    """
    t, t_next = timestep_pairs(schedule, timesteps)
    log_ab, log_ab_next = (log_alpha_bar(schedule, s, dtype) for s in (t, t_next))
    signal, sigma = alpha_sigma(log_ab)
    signal_next, sigma_next = alpha_sigma(log_ab_next)
    h = jnp.log(signal_next / sigma_next) - jnp.log(signal / sigma)
    gain = -signal_next * jnp.expm1(-h)
    growth = jnp.where(t_next < 0, 0, h / jnp.roll(h, 1)).at[0].set(0)
    return t, signal, sigma, sigma_next / sigma, gain, h, growth


def _weighted_means(h, highest):
    """Means of θ, θ², … θ^highest over [0, 1] with density e^{−(1−θ)h}, arrays like h: by quadrature, because their
    closed forms cancel where h is small.
    """
    theta = jnp.asarray(_NODES, h.dtype)
    density = jnp.asarray(_WEIGHTS, h.dtype) * jnp.exp(-(1 - theta) * h[..., None])  # [S, Q]
    return [jnp.sum(density * theta**k, -1) / jnp.sum(density, -1) for k in range(1, highest + 1)]
