"""Datasets, the order in which training sees them, and their preparation.

Public: `datasets.Dataset`, `load_dataset`; `batches.batch_at`. `cache` and what it needs import no jax.
"""
