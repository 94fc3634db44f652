"""The mathematics of both papers: noise schedules, what a network predicts, training objectives.

Public: `schedule.NoiseSchedule`, `linear_schedule`, `cosine_schedule`, `add_noise`; `objectives.Objective`, `paper`,
`released`, `sample_noise`, `loss`, `skip_scale`; `parameterization.PREDICTIONS`; `types.EpsFn`, `NoiseFn`.
"""
