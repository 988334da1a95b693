"""From rows of gradients to scores: one file a method."""
