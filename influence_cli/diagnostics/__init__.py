"""What `check` and `inspect` compute."""
