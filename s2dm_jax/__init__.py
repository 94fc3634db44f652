"""Skip-step (S²-DM) and sequence-aware (SA-DPM) training of diffusion models in JAX/Flax."""

__version__ = "0.1.0"
