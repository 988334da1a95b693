"""Imports of optional libraries, with an error that names the extra."""

import importlib
import os
from types import ModuleType

from influence_cli.errors import DefinitionError


def import_library(name: str, extra: str) -> ModuleType:
    """Raises DefinitionError where the library is not installed."""
    if extra == "hf":  # before the first import: no library asks a model hub
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DefinitionError(
            f"{name} can't be imported: {error}",
            f"expected: the extra {extra} of influence-cli",
            f"pip install 'influence-cli[{extra}]'",
        ) from error
