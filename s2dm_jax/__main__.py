"""`python -m s2dm_jax`: the command line of `s2dm_jax.main`."""

from s2dm_jax.common.signals import end_on_interrupt

if __name__ == "__main__":
    end_on_interrupt()

    from s2dm_jax.main import main

    main()
