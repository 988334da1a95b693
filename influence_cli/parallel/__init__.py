"""Which part of the work a process does."""
