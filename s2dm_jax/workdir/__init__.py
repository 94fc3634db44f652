"""A run's folder: config, lock, checkpoints, state, exported samplers, results."""
