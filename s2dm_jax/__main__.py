"""`python -m s2dm_jax`: the command line of `s2dm_jax.main`."""

from s2dm_jax.main import main

if __name__ == "__main__":
    main()
