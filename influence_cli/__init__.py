"""Which training examples made the model predict this, and which worked against it?

Importing this package does not import torch; the rooms below do when they are used.
"""

from typing import TYPE_CHECKING, Any

from influence_cli.errors import InfluenceError

if TYPE_CHECKING:
    from influence_cli.run.recorder import TrajectoryRecorder

__version__ = "0.1.0"
__all__ = ["InfluenceError", "TrajectoryRecorder", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "TrajectoryRecorder":  # brings torch along
        from influence_cli.run.recorder import TrajectoryRecorder

        return TrajectoryRecorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
