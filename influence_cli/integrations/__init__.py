"""Files, models and trainers of other libraries. Each needs an extra of this package."""
