"""Samplers: pure functions (eps_fn, x_T, schedule, timesteps, *, …) → x_0, each a `lax.scan` over its steps.

The contract of every sampler; each one's own docstring lists only what it adds or restricts:

    Args:
      eps_fn: the network, (x [B, H, W, C], t [B]) → ε [B, H, W, C]; `sn` and `npr` take a network with a variance head,
        which returns ε and the head's output, both [B, H, W, C] (`diffusion/types.py`).
      x_T: noise to start from, [B, H, W, C]; the arithmetic is in its dtype, whatever the network returns.
      schedule: the forward process, a `NoiseSchedule`.
      timesteps: int [S], ascending, in [0, T). Sampling visits them from the last to the first, and the last step
        always arrives at the clean image (t = −1, alpha_bar = 1). The number S is part of the compiled program, the
        values are not: other timesteps of the same number compile nothing.
      noise_fn: of the stochastic samplers (`ddpm`, `analytic`, `sn`, `npr`, and `ddim` with eta above 0): index of the
        step, from 0 → standard normal [B, H, W, C] (`noise.per_image_noise`). The step to the clean image adds none.
      clip_x0: clip each prediction of x_0 to [−1, 1]; the default of these samplers but `ddim`.
      dynamic_threshold: clip it to this quantile of each image's |x_0| instead, such as 0.995, and scale it into
        [−1, 1] (`thresholding.threshold_x0`); None for none.
      return_x0: also return the prediction of x_0 that each step makes.

    Returns:
      x_0 [B, H, W, C], around [−1, 1]; with `return_x0` a pair of it and the predictions [S, B, H, W, C], that of the
      noisiest timestep first.

    Raises:
      ValueError: for timesteps that are not ascending integers in [0, T) or too few for the sampler; for an option
        outside its choices. Of traced timesteps only the shape can be checked, of a traced eta nothing.

A new sampler is a function in a file of this folder, built from the parts in `common`, and one line in
`specs.SAMPLERS`. `specs` and `timesteps` import no jax.
"""
