"""What a folder of a training run holds: Hugging Face, adapters, Lightning or plain checkpoints.

It reads JSON files and headers alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from influence_cli.errors import UsageProblem, listed
from influence_cli.integrations.hf_model import find_base, is_adapter_folder, read_head_size
from influence_cli.storage.json_text import read_json_file

# the end of a class's name in config.json -> the kind of task
ARCHITECTURES = {
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForMaskedLM": "masked-lm",
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "seq2seq-lm",
    "ForImageClassification": "image-classification",
}
ADAPTER_TASKS = {
    "SEQ_CLS": "sequence-classification",
    "TOKEN_CLS": "token-classification",
    "CAUSAL_LM": "causal-lm",
    "SEQ_2_SEQ_LM": "seq2seq-lm",
}
LONGEST = 100_000  # a tokenizer without a limit names a larger number


@dataclass(frozen=True)
class HuggingFaceFolder:
    """A Hugging Face run. `folder`: its newest checkpoint. `base`: of an adapter."""

    folder: Path
    kind: str
    architecture: str
    config: dict[str, Any]  # Any: JSON values
    base: Path | None

    @property
    def max_length(self) -> int | None:
        """The most tokens that tokenizer and model take; None where neither has a limit."""
        limits = []
        for place in dict.fromkeys((self.folder, self.folder.parent, self.base or self.folder)):
            path = place / "tokenizer_config.json"
            if path.is_file():
                limits.append(read_json_file(path).get("model_max_length"))
        positions = self.config.get("max_position_embeddings") or self.config.get("n_positions")
        if isinstance(positions, int):  # RoBERTa's positions begin behind the padding token
            shift = self.config.get("model_type") in ("roberta", "xlm-roberta", "camembert")
            limits.append(positions - 2 if shift else positions)
        known = [int(limit) for limit in limits if isinstance(limit, int | float)]
        return min((limit for limit in known if limit < LONGEST), default=None)

    @property
    def class_count(self) -> int | None:
        """The number of classes; None where no file tells it."""
        if self.base is not None:
            return read_head_size(self.folder)
        names = self.config.get("id2label")
        return len(names) if names else self.config.get("num_labels", 2)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes in the order of their numbers; none where config.json has
        LABEL_0, LABEL_1, ...
        """
        names = self.config.get("id2label") or {}
        ordered = [str(names[key]) for key in sorted(names, key=int)]
        return [] if not ordered or ordered[0] == "LABEL_0" else ordered


def find_model_folder(run: Path) -> Path | None:
    """The newest checkpoint-N of a Trainer, else the run itself if it holds a saved model."""
    numbered = []
    for place in (run, run / "checkpoints"):
        for path in place.glob("*[0-9]"):
            match = re.search(r"(\d+)$", path.name)
            if match and describes_model(path):
                numbered.append((int(match[1]), path))
    if numbered:
        return max(numbered)[1]
    return run if describes_model(run) else None


def describes_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or is_adapter_folder(folder)


def open_folder(run: Path, base: Path | None) -> HuggingFaceFolder | None:
    """The Hugging Face run in this folder, if it is one. Raises UsageProblem for a model whose
    task has no template.
    """
    folder = find_model_folder(run)
    if folder is None:
        return None
    base = find_base(folder, base) if is_adapter_folder(folder) else None
    config = dict(read_json_file((base or folder) / "config.json"))
    architecture = str((config.get("architectures") or [config.get("model_type", "?")])[0])
    task = ""
    if base is not None:
        task = str(read_json_file(folder / "adapter_config.json").get("task_type"))
    kind = ADAPTER_TASKS.get(task) or find_kind(architecture, config)
    if kind is None:
        raise UsageProblem(
            f"{folder / 'config.json'}: {architecture} has no template",
            f"expected: a name that ends with {listed(list(ARCHITECTURES))}",
            "write definition.py by hand: influence init DIR --template trainer",
        )
    return HuggingFaceFolder(folder, kind, architecture, config, base)


def find_kind(architecture: str, config: dict[str, Any]) -> str | None:  # Any: JSON values
    for ending, kind in ARCHITECTURES.items():
        if architecture.endswith(ending):
            is_seq2seq = kind == "seq2seq-lm"
            return None if is_seq2seq and not config.get("is_encoder_decoder") else kind
    return None


def find_lightning_checkpoints(run: Path) -> list[Path]:
    """Files *.ckpt of a Lightning run, in the folder or its checkpoints/."""
    return sorted(path for place in (run, run / "checkpoints") for path in place.glob("*.ckpt"))
