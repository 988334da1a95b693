"""Opens a run and answers requests: what the command line calls, and Python programs."""
