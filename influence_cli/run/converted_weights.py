"""Hugging Face folders whose saved tensors have another layout than the model in memory.

transformers saves the experts of a mixture one by one and joins them in memory; older versions
gave some tensors other names. `from_pretrained` knows these conversions.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Hides the messages and the progress bar of transformers' loading."""
    from transformers.utils import logging

    level, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if has_bar:
            logging.enable_progress_bar()


def has_conversion(folder: Path, model: nn.Module) -> bool:
    """Whether transformers can convert this folder's weights for this model."""
    return (folder / "config.json").is_file() and hasattr(type(model), "from_pretrained")


def read_converted(folder: Path, model: Any) -> tuple[dict[str, Tensor], list[str]]:  # Any: a
    # PreTrainedModel; transformers may be absent
    """The folder's weights by the keys of this model, and what does not fit, as lines of an error.

    transformers reads local files alone. Raises OSError or ValueError for what it can't read.
    """
    with quiet_loading():
        loaded, info = type(model).from_pretrained(
            folder,
            config=model.config,
            dtype=next(model.parameters()).dtype,
            local_files_only=True,
            output_loading_info=True,
        )
    lines = [f"missing:    {key}" for key in sorted(info["missing_keys"])]
    lines += [f"unexpected: {key}" for key in sorted(info["unexpected_keys"])]
    lines += [f"shape:      {key}" for key in sorted(map(str, info["mismatched_keys"]))]
    return dict(loaded.state_dict()), lines
