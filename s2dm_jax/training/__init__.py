"""Training: the loop, the step, logging, failures that stop a run.

Public: `loop.train`; `step.StepConfig`, `update`, `make_train_chunk`.
"""
