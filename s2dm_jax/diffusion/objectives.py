"""The training objectives of S²-DMs and SA-DPM as pure functions, one value per example.

    L = τ·L_simple + (1−τ)·L_skip + λ·L_sa

Every timestep in the window of an example goes through the network in one call; L_skip reuses the output that L_simple
needs. `docs/objectives.md` lists where the papers and their authors' code differ.

A new term is a function like `Term.compute` and one entry of `TERMS`: `loss` then adds it, and the logged metrics,
`train.keep_best`, the loss curves and the run's summary include it under its name there.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from s2dm_jax.diffusion.schedule import NoiseSchedule, add_noise, extract
from s2dm_jax.diffusion.types import EpsFn


@dataclasses.dataclass(frozen=True)
class Objective:
    """The training objective; the presets `paper` and `released` below fill in the options.

    Attributes:
      skip: sampling stride that L_skip prepares for (S²-DMs, section 3.2); 0 leaves L_skip out.
      tau: weight of L_simple; L_skip gets 1 − tau (S²-DMs, eq. 13).
      K: timesteps in the window of L_sa (SA-DPM, eq. 6); 1 leaves L_sa out: one timestep has no neighbours.
      lam: weight λ of L_sa.
      skip_noise: target of L_skip. "shared": the noise that made x_t (eq. 12); "independent": a second one (released
        code); "expected": the expectation over that second one, with no noise drawn.
      skip_factors: number of one-step alphas multiplied in alpha_skip.
      skip_boundary: timesteps with fewer steps below them than factors. "truncate": the factors that exist; "plain":
        L_simple alone with weight 1 (released code).
      window: timesteps beside t. "forward": t … t+K−1 (Algorithm 3); "backward": t … t−K+1 (released code).
      window_boundary: which timesteps count in L_sa. "inner": all but the first (τ_s = 0 outside {2 … T} in the paper's
        count); "all": every timestep that exists (released code).
      sa_norm: "K^2" or "K", the divisor of L_sa ("K" in SA-DPM's first public code).
      use_tau_s: weight each residual in L_sa by τ_s of Theorem 1; the paper itself leaves it out in practice.
      reduction: "sum" (a squared norm, as the papers write it) or "mean" over the pixels of an image.
      antithetic: draw half of the timesteps as mirrors T−1−t of the others (DDIM code).
    """

    skip: int = 0
    tau: float = 0.99
    K: int = 1
    lam: float = 0.0
    skip_noise: str = "shared"
    skip_factors: int = 0
    skip_boundary: str = "truncate"
    window: str = "forward"
    window_boundary: str = "inner"
    sa_norm: str = "K^2"
    use_tau_s: bool = False
    reduction: str = "sum"
    antithetic: bool = False

    @property
    def has_skip(self) -> bool:
        return self.skip > 0 and self.tau < 1

    @property
    def has_sequence(self) -> bool:
        return self.K > 1 and self.lam > 0

    @property
    def num_timesteps_per_image(self) -> int:
        """Timesteps per image that go through the network in one training step."""
        return self.K if self.has_sequence else 1

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms that are on, in the order of TERMS."""
        return tuple(name for name, term in TERMS.items() if term.is_on(self))

    @property
    def formula(self) -> str:
        """The objective as text, "0.99·L_simple + 0.01·L_skip (skip 10, shared noise)"."""
        return " + ".join(TERMS[name].text(self) for name in self.terms)


def paper(skip: int = 0, tau: float = 0.99, K: int = 1, lam: float = 0.0, **options: Any) -> Objective:
    """The objective as the two papers write it (S²-DMs eq. 12–13; SA-DPM Algorithm 3)."""
    return Objective(skip, tau, K, lam, **{"skip_factors": skip, **options})


def released(skip: int = 0, tau: float = 0.99, K: int = 1, lam: float = 0.0, **options: Any) -> Objective:
    """The objective as the authors' published code computes it.

    S²-DMs' code averages over pixels, SA-DPM's sums; with both terms on, this sums.
    """
    fixed = {
        "skip_noise": "independent",
        "skip_factors": max(skip - 1, 0),
        "skip_boundary": "plain",
        "window": "backward",
        "window_boundary": "all",
        "reduction": "mean" if skip and not (K > 1 and lam) else "sum",
        "antithetic": True,
    }
    return Objective(skip, tau, K, lam, **{**fixed, **options})


class NoiseSample(NamedTuple):
    """The random numbers of one training step.

    Attributes:
      t: int32 [B], timestep of L_simple and L_skip.
      noise: float32 [B, K, H, W, C]; noise[:, 0] makes x_t, the others the rest of the window.
      skip_noise: float32 [B, H, W, C], or None unless the objective's `skip_noise` is "independent".
    """

    t: jax.Array
    noise: jax.Array
    skip_noise: jax.Array | None


def sample_noise(objective: Objective, key: jax.Array, T: int, shape: tuple[int, ...]) -> NoiseSample:
    """Draws timesteps and noise for a batch of images of `shape` [B, H, W, C], a function of `key` alone."""
    t_key, noise_key, skip_key = jax.random.split(key, 3)
    batch = shape[0]
    if objective.antithetic:
        half = jax.random.randint(t_key, (batch // 2 + 1,), 0, T)
        t = jnp.concatenate([half, T - 1 - half])[:batch]
    else:
        t = jax.random.randint(t_key, (batch,), 0, T)
    window = (batch, objective.num_timesteps_per_image, *shape[1:])
    noise = jax.random.normal(noise_key, window)  # [B, K, H, W, C]
    second = objective.has_skip and objective.skip_noise == "independent"
    return NoiseSample(t, noise, jax.random.normal(skip_key, shape) if second else None)


def alpha_skip(schedule: NoiseSchedule, factors: int) -> np.ndarray:
    """α_skip[t] = α_t·α_{t−1}·…, `factors` of them or as many as exist (S²-DMs, section 3.2); float64 [T]."""
    alpha_bar = schedule.alpha_bar_with_x0
    after = np.arange(1, schedule.T + 1)
    return alpha_bar[after] / alpha_bar[np.maximum(after - factors, 0)]


def skip_ratio(schedule: NoiseSchedule, objective: Objective) -> np.ndarray:
    """c_t = √(1−α_skip)/√α_skip, by which L_skip multiplies the prediction (S²-DMs, eq. 12); float64 [T]."""
    a = alpha_skip(schedule, objective.skip_factors)
    return np.sqrt((1 - a) / a)


def simple_weight(schedule: NoiseSchedule, objective: Objective) -> np.ndarray:
    """Weight of L_simple at each timestep; L_skip gets one minus that (S²-DMs, eq. 13); float64 [T]."""
    if not objective.has_skip:
        return np.ones(schedule.T)
    below_boundary = np.arange(schedule.T) < objective.skip_factors
    return np.where(below_boundary & (objective.skip_boundary == "plain"), 1.0, objective.tau)


def skip_quadratic(schedule: NoiseSchedule, objective: Objective) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """w, s, k [T] of τ·L_simple + (1−τ)·L_skip = w_t·‖f − s_t·ε‖² + k_t·‖ε‖², the square completed (in neither paper).

    With independent noise the identity holds in expectation over the second noise. At the optimum the network f is
    s_t·E[ε|x_t]: training with L_skip rescales what plain training finds.
    """
    tau, c = simple_weight(schedule, objective), skip_ratio(schedule, objective)
    cross = c if objective.skip_noise == "shared" else 0.0
    w = tau + (1 - tau) * c**2
    s = (tau + (1 - tau) * cross) / w
    return w, s, 1 - w * s**2


def skip_scale(schedule: NoiseSchedule, skip: int, tau: float = 0.99, preset: str = "paper") -> np.ndarray:
    """s_t, by which the optimum under L_skip differs from that under L_simple: a control experiment that neither paper
    ran.

    `skip` and `tau` are those of `Objective`, `preset` is "paper" or "released". Multiply any pretrained network's
    output by the result, float64 [T], while sampling (`samplers.common.scale_eps`).
    """
    return skip_quadratic(schedule, PRESETS[preset](skip=skip, tau=tau))[1]


def tau_s(schedule: NoiseSchedule) -> np.ndarray:
    """τ_s of SA-DPM's Theorem 1: the weight of timestep s's error in the total gap at the end; float64 [T].

    It is 0 at the first timestep (the paper's s = 1), which the theorem's sum does not reach.
    """
    a, before = schedule.alpha_bar, schedule.alpha_bar_with_x0[:-1]
    gamma_1 = np.sqrt(before) * schedule.beta / (1 - a)
    with np.errstate(divide="ignore"):
        carried = np.sqrt(before) * (1 - a[0]) / (np.sqrt(a[0]) * (1 - before))
    tau = carried * gamma_1 * np.sqrt((1 - a) / a)
    return np.where(np.arange(schedule.T) == 0, 0.0, tau)


def window_timesteps(objective: Objective, t: jax.Array) -> jax.Array:
    """Timesteps in the window of each t (SA-DPM, Algorithm 3), some of them outside [0, T): int32 [B, K]."""
    step = 1 if objective.window == "forward" else -1
    return t[:, None] + step * jnp.arange(objective.num_timesteps_per_image)  # [B, K]


def window_weight(schedule: NoiseSchedule, objective: Objective, timesteps: jax.Array) -> jax.Array:
    """Weight of each residual in L_sa: τ_s or 1, and 0 for timesteps that do not count; float32 [B, K]."""
    first = 1 if objective.window_boundary == "inner" else 0
    counts = (timesteps >= first) & (timesteps < schedule.T)
    weight = tau_s(schedule) if objective.use_tau_s else np.ones(schedule.T)
    return jnp.where(counts, jnp.asarray(weight, jnp.float32)[jnp.clip(timesteps, 0, schedule.T - 1)], 0.0)


def sequence_loss(residuals: jax.Array, weight: jax.Array, norm: str = "K^2") -> jax.Array:
    """L_sa per pixel [B, H, W, C]: (1/K²)·(Σ_s τ_s·(ε_θ(x_s, s) − ε_s))² (SA-DPM, Algorithm 3).

    Args:
      residuals: [B, K, H, W, C], prediction minus noise at each timestep of the window.
      weight: τ_s, [B, K].
      norm: "K^2", or "K" for a divisor K.
    """
    K = residuals.shape[1]
    # At JAX's default precision a GPU would round the residuals to TF32, a TPU to bfloat16.
    gap = jnp.einsum("bk...,bk->b...", residuals, weight, precision="highest")  # [B, H, W, C]
    return jnp.square(gap) / (K**2 if norm == "K^2" else K)


class Term(NamedTuple):
    """One term of the objective.

    Attributes:
      is_on: whether an objective has the term.
      text: its weight and symbol, for `Objective.formula`.
      compute: function of schedule, objective, sample, the window's timesteps [B, K] and the predictions
        [B, K, H, W, C] → the weight, [B] or a number, and the unweighted term per pixel, [B, H, W, C].
    """

    is_on: Callable[[Objective], bool]
    text: Callable[[Objective], str]
    compute: Callable[..., tuple[jax.Array | float, jax.Array]]


def _simple_term(schedule, objective, sample, timesteps, eps):
    """(ε − ε_θ)² (S²-DMs eq. 7; SA-DPM eq. 3)."""
    weight = _tau_of(schedule, objective, sample) if objective.has_skip else 1.0
    return weight, jnp.square(sample.noise[:, 0] - eps[:, 0])


def _skip_term(schedule, objective, sample, timesteps, eps):
    """(ε − c_t·ε_θ)² (S²-DMs, eq. 12); its mean over an independent ε is 1 + (c_t·ε_θ)²."""
    weight = 1 - _tau_of(schedule, objective, sample)
    c = extract(skip_ratio(schedule, objective), sample.t, sample.noise[:, 0])  # [B, 1, 1, 1]
    if objective.skip_noise == "expected":
        return weight, 1 + jnp.square(c * eps[:, 0])
    target = sample.noise[:, 0] if objective.skip_noise == "shared" else sample.skip_noise
    if target is None:
        raise ValueError("sample.skip_noise is missing, which skip_noise='independent' needs")
    return weight, jnp.square(target - c * eps[:, 0])


def _sequence_term(schedule, objective, sample, timesteps, eps):
    weight = window_weight(schedule, objective, timesteps)  # [B, K]
    return objective.lam, sequence_loss(eps - sample.noise, weight, objective.sa_norm)


def _tau_of(schedule, objective, sample):
    return jnp.asarray(simple_weight(schedule, objective), sample.noise.dtype)[sample.t]  # [B]


# In the order of the sum, of logs and of tables.
TERMS = {
    "simple": Term(lambda o: True, lambda o: f"{o.tau:g}·" * o.has_skip + "L_simple", _simple_term),
    "skip": Term(
        lambda o: o.has_skip, lambda o: f"{1 - o.tau:g}·L_skip (skip {o.skip}, {o.skip_noise} noise)", _skip_term
    ),
    "sequence": Term(lambda o: o.has_sequence, lambda o: f"{o.lam:g}·L_sa (K = {o.K})", _sequence_term),
}


def loss(
    eps_fn: EpsFn, schedule: NoiseSchedule, objective: Objective, x0: jax.Array, sample: NoiseSample
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """L = τ·L_simple + (1−τ)·L_skip + λ·L_sa (S²-DMs eq. 13; SA-DPM eq. 6), with one network call.

    Args:
      eps_fn: the network, (x [N, H, W, C], t [N]) → ε [N, H, W, C]; called once with N = B·K.
      schedule: the forward process.
      objective: the terms and their options.
      x0: images in [−1, 1], [B, H, W, C].
      sample: timesteps and noise, from `sample_noise`.

    Returns:
      The loss of each example [B], and `objective.terms` by name, unweighted, each [B].

    Raises:
      ValueError: for a sample without the second noise that the objective needs.
    """
    timesteps = window_timesteps(objective, sample.t)  # [B, K]
    # Those outside [0, T) get weight 0; the network is called for all, so that shapes do not depend on t.
    clipped = jnp.clip(timesteps, 0, schedule.T - 1)
    noised = functools.partial(add_noise, schedule, x0)
    x_t = jax.vmap(noised, in_axes=1, out_axes=1)(clipped, sample.noise)  # [B, K, H, W, C]
    # [B, K] becomes one batch axis, images outermost, so that a batch sharded over devices stays in place.
    eps = eps_fn(x_t.reshape(-1, *x0.shape[1:]), clipped.reshape(-1)).reshape(x_t.shape)  # [B, K, H, W, C]

    reduce = jnp.sum if objective.reduction == "sum" else jnp.mean
    terms, weighted = {}, []
    for name in objective.terms:
        weight, per_pixel = TERMS[name].compute(schedule, objective, sample, timesteps, eps)
        terms[name] = reduce(per_pixel, axis=tuple(range(1, per_pixel.ndim)))  # [B]
        weighted.append(weight * terms[name])
    return functools.reduce(jnp.add, weighted), terms


PRESETS = {"paper": paper, "released": released}
