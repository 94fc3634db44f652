"""Evaluation: features, metrics, references, reports.

Public: `evaluate.evaluate`; the functions of `metrics`; `estimation_gap.estimation_gap`.
"""
