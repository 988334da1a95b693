"""GradientRows keyed by (checkpoint, split, column, example), kept on disk."""
