"""Which training examples made the model predict this, and which worked against it?

Importing this package does not import torch; the rooms below do when they are used.
"""

from influence_cli.errors import InfluenceError

__version__ = "0.1.0"
__all__ = ["InfluenceError", "__version__"]
