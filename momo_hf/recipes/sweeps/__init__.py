"""Learning-rate sweeps: a task, optimizers, learning rates and seeds, run by optuna. One file a subject."""
