"""A campaign that looks for lost work, silent errors and tracebacks (README.md)."""
