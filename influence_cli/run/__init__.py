"""What the user has on disk: definition, checkpoints, trajectory. run.py opens them together."""
