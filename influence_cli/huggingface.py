"""Hugging Face models and their data, for a definition.py. Needs the extra `hf`.

`Task` holds what the functions of a definition return: model, examples, batches and losses.
"""

from influence_cli.integrations.hf_task import HuggingFaceTask as Task

__all__ = ["Task"]
