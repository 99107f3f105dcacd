"""The training loop, checkpoints and logs that every system shares."""
