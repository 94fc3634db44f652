"""Skip-step (S²-DM) and sequence-aware (SA-DPM) training of diffusion models in JAX/Flax."""

from typing import TYPE_CHECKING

from s2dm_jax.common.version import __version__

__all__ = ["__version__", "load"]

if TYPE_CHECKING:
    from s2dm_jax.inference.model import load
else:

    def __getattr__(name):
        # `s2dm_jax.load` is here for notebooks, but jax takes seconds to import.
        if name == "load":
            from s2dm_jax.inference.model import load

            return load
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
