"""Merges peft adapters into the weights of their base model."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from influence_cli.errors import CheckpointError, UsageProblem, listed
from influence_cli.integrations.pickled_files import read_pickled
from influence_cli.integrations.saved_weights import clean_tensors
from influence_cli.storage.json_text import read_json_file
from influence_cli.storage.safetensors_io import read_tensors

# of adapter_config.json -> the class of transformers that a Trainer builds for it
MODELS = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
}
HEADS = ("classifier.weight", "score.weight", "classifier.out_proj.weight")  # of (labels, width)


def merge_adapter(folder: Path, base: Path, placeholders: bool) -> dict[str, Tensor]:
    """The full weights: of `base`, with the adapter of `folder` merged in. Reads only local files.

    Raises UsageProblem without the extra hf or a base model; CheckpointError for an adapter that
    peft can't merge into it.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise UsageProblem(
            f"--base needs transformers and peft: {error}", "pip install 'influence-cli[hf]'"
        ) from error
    if not (base / "config.json").is_file():
        raise UsageProblem(
            f"--base {base} holds no Hugging Face model",
            "found: no config.json; expected: the folder from which the base model was loaded",
        )
    adapter = read_adapter(folder, placeholders)
    config = read_config(folder)
    options: dict[str, Any] = {"local_files_only": True}  # Any: arguments of from_pretrained
    name = MODELS.get(str(config.get("task_type")))
    if name in (MODELS["SEQ_CLS"], MODELS["TOKEN_CLS"]) and (count := count_labels(adapter)):
        options["num_labels"] = count
    try:
        kind = getattr(transformers, name or find_architecture(base))
        with quiet_libraries():
            model = kind.from_pretrained(str(base), **options)
            wrapped = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(str(folder)))
        result: Any = peft.set_peft_model_state_dict(wrapped, adapter)  # a named tuple of torch
        names = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
        refuse_leftovers(folder, sorted(names.keys() - adapter.keys()), result.unexpected_keys)
        merged = wrapped.merge_and_unload(safe_merge=True)
    except CheckpointError:
        raise
    except Exception as error:  # transformers and peft raise many kinds
        raise CheckpointError(
            f"peft can't merge {folder} into {base}",
            f"found: {type(error).__name__} {str(error)[:500]}",
            "name the folder of the base model that the adapter was trained on",
        ) from error
    return clean_tensors(merged.state_dict(), folder.name, strip_outer=False)[0]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without a progress bar for each model, and what peft and transformers deprecate."""
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def read_adapter(folder: Path, placeholders: bool) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if not path.is_file():
        return read_pickled(folder / "adapter_model.bin", placeholders)
    try:
        return read_tensors(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}", "copy it again") from error


def read_config(folder: Path) -> dict[str, Any]:  # Any: JSON values
    try:
        return dict(read_json_file(folder / "adapter_config.json"))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} can't be read: {error}",
            "copy it from where the adapter was saved",
        ) from error


def count_labels(adapter: dict[str, Tensor]) -> int | None:
    """The labels of a classifier that was trained beside the adapter; None where there is none."""
    sizes = {
        value.shape[0] for key, value in adapter.items() if key.endswith(HEADS) and value.ndim == 2
    }
    return sizes.pop() if len(sizes) == 1 else None


def find_architecture(base: Path) -> str:
    """The class that config.json of the base model names. Raises KeyError where it names none."""
    return str(json.loads((base / "config.json").read_bytes())["architectures"][0])


def refuse_leftovers(folder: Path, missing: list[str], unexpected: list[str]) -> None:
    """Raises CheckpointError for adapter tensors that the file lacks, or that the model lacks."""
    if unexpected or missing:
        raise CheckpointError(
            f"{folder} does not fit the base model",
            *([f"unexpected: {listed(unexpected)}"] if unexpected else []),
            *([f"missing: {listed(missing)}"] if missing else []),
            "name the folder of the base model that the adapter was trained on",
        )
