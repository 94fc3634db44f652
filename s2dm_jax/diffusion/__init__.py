"""The mathematics of both papers.

Public: `schedule.NoiseSchedule`, `linear_schedule`, `cosine_schedule`, `add_noise`; `objectives.Objective`, `paper`, `released`,
`sample_noise`, `loss`, `skip_scale`; `types.EpsFn`; `parameterization.PREDICTIONS`.
"""
