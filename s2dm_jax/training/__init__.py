"""Training: the loop, the step, what is logged, what stops a run.

Public: `loop.train`; `step.StepConfig`, `update`, `make_train_chunk`.
"""
