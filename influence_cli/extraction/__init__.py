"""Run the model to fill the cache, or to stream past it."""
