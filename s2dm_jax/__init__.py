"""Skip-step (S²-DM) and sequence-aware (SA-DPM) training of diffusion models in JAX/Flax."""

__version__ = "0.1.0"


def __getattr__(name: str):
    # `s2dm_jax.load` is here for notebooks, but jax takes seconds to import.
    if name == "load":
        from s2dm_jax.sample import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
