"""Sampling from trained runs.

Public: `model.load`, `Model` with `sample` and `sampler`; `sampler.sample_batches`; `visualize.interpolate`,
`trajectory`, `compare`.
"""
