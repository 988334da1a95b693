"""Lightning modules and their data, for a definition.py. Needs the extra `lightning`.

`Task` holds what the functions of a definition return: model, examples and losses.
"""

from influence_cli.integrations.lightning_task import LightningTask as Task

__all__ = ["Task"]
