"""Which training examples made the model predict this, and which worked against it?

Importing this package does not import torch; the rooms below do when they are used.
"""

from typing import TYPE_CHECKING, Any

from influence_cli.errors import InfluenceError

if TYPE_CHECKING:
    from influence_cli.api.influence_run import open_run
    from influence_cli.run.recorder import TrajectoryRecorder

__version__ = "0.1.0"
__all__ = ["InfluenceError", "TrajectoryRecorder", "__version__", "open_run"]


def __getattr__(name: str) -> Any:
    if name == "TrajectoryRecorder":  # brings torch along
        from influence_cli.run.recorder import TrajectoryRecorder

        return TrajectoryRecorder
    if name == "open_run":  # brings the methods' declarations along, and torch when it is called
        from influence_cli.api.influence_run import open_run

        return open_run
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
