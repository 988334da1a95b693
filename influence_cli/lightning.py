"""Lightning modules and their data, for a definition.py; and recording a Trainer's training.

`Task` holds what the functions of a definition return: model, examples and losses. `Recorder` is a
callback. Needs the extra `lightning`.
"""

from typing import TYPE_CHECKING, Any

from influence_cli.integrations.lightning_task import LightningTask as Task

if TYPE_CHECKING:
    from influence_cli.integrations.lightning_recording import Recorder

__all__ = ["Recorder", "Task"]


def __getattr__(name: str) -> Any:
    if name == "Recorder":  # imports lightning, which a definition may do without
        from influence_cli.integrations.extras import import_library

        import_library("lightning", "lightning")
        from influence_cli.integrations.lightning_recording import Recorder

        return Recorder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
