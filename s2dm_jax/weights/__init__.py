"""Weights in and out: PyTorch checkpoints, diffusers, safetensors, exported samplers, model cards.

Public: `read.read_weights`, `write.write_weights`, `export.export_programs`.
"""
