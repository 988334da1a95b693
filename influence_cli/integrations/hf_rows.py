"""How each kind of task reads its rows and labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from influence_cli.errors import DataError, listed
from influence_cli.integrations import hf_encoding as encoding
from influence_cli.integrations.hf_encoding import Example, Row

if TYPE_CHECKING:
    from influence_cli.integrations.hf_task import HuggingFaceTask

GENERIC = "LABEL_0"  # config.json of a model whose classes have no names


def encode_row(task: "HuggingFaceTask", row: Row) -> Example:
    """One example: tensors for the model, `text` for people, `id`.

    A row {"text": ...}, as --query TEXT gives it, is read as the task's only column of text.
    """
    if len(task.text) == 1 and task.text[0] not in row and "text" in row:
        row = {**row, task.text[0]: row["text"]}
    if encoding.is_encoded(row):
        example = complete_encoded(task, encoding.encoded_columns(row))
    else:
        example = encode_inputs(task, row)
    texts = [row[name] for name in task.text if isinstance(row.get(name), str)]
    if texts:
        example["text"] = " | ".join(texts)
    elif task.image is not None and isinstance(row.get(task.image), str):
        example["text"] = "/".join(Path(row[task.image]).parts[-2:])
    if task.id is not None:
        example["id"] = row.get(task.id)
    return example


def complete_encoded(task: "HuggingFaceTask", example: Example) -> Example:
    """Adds the labels that a tokenised row of a language model leaves out."""
    if task.kind == "causal-lm" and "labels" not in example:
        ids = example["input_ids"]
        mask = example.get("attention_mask", torch.ones_like(ids))
        example["labels"] = torch.where(mask.bool(), ids, encoding.IGNORED)
    if task.kind == "masked-lm" and "labels" not in example:
        return masked(task, example)
    if task.kind == "image-classification" and "labels" in example:
        example["labels"] = label_tensor(task, example["labels"])
    if task.kind == "sequence-classification" and "labels" in example:
        example["labels"] = label_tensor(task, example["labels"])
    return example


def encode_inputs(task: "HuggingFaceTask", row: Row) -> Example:
    if task.kind == "image-classification":
        image = encoding.read_column(row, task.image or "image")
        example: Example = {"pixel_values": encoding.encode_image(task.processor, image)}
        return add_label(task, example, row)
    texts = encoding.read_texts(row, task.text or ("text",))
    if task.kind == "causal-lm":
        return encoding.encode_continuation(
            task.tokenizer, texts, task.max_length, task.end_of_text
        )
    if task.kind == "seq2seq-lm":
        return encode_pair(task, row)
    if task.kind == "token-classification":
        return encode_tagged(task, row)
    example = encoding.encode_text(task.tokenizer, texts, task.max_length)
    return masked(task, example) if task.kind == "masked-lm" else add_label(task, example, row)


def masked(task: "HuggingFaceTask", example: Example) -> Example:
    return encoding.mask_tokens(
        task.tokenizer, example, task.mask_probability, task.mask_seed, task.config.vocab_size
    )


def encode_pair(task: "HuggingFaceTask", row: Row) -> Example:
    """Source and target of a sequence-to-sequence model: the two columns of `text`."""
    source, *targets = task.text or ("text",)
    target = targets[0] if targets else task.label or "target"
    example = encoding.encode_text(
        task.tokenizer, encoding.read_texts(row, [source]), task.max_length
    )
    (text,) = encoding.read_texts(row, [target])
    labels = task.tokenizer(
        text_target=text, truncation=task.max_length is not None, max_length=task.max_length
    )
    return {**example, "labels": torch.tensor(labels["input_ids"])}


def encode_tagged(task: "HuggingFaceTask", row: Row) -> Example:
    (words,) = encoding.read_texts(row, task.text or ("tokens",))
    words = words.split() if isinstance(words, str) else words
    labels = None
    if task.label is not None and row.get(task.label) is not None:
        tags = row[task.label]
        tags = tags.split() if isinstance(tags, str) else tags
        if len(tags) != len(words):
            raise DataError(
                f"column {task.label} has {len(tags)} labels for {len(words)} words",
                "expected: one label per word",
            )
        labels = [class_number(task, tag) for tag in tags]
    return encoding.encode_words(task.tokenizer, words, labels, task.max_length)


# ---------------------------------------------------------------- labels
def add_label(task: "HuggingFaceTask", example: Example, row: Row) -> Example:
    """A row without a label gives an example without `labels`: for predictions to explain."""
    value = row.get(task.label) if task.label is not None else None
    if value is None or value == "":
        return example
    return {**example, "labels": label_tensor(task, value)}


def label_tensor(task: "HuggingFaceTask", value: Any) -> Tensor:  # Any: the user's label
    """The label as the model takes it: a class number, a value, or a vector of classes."""
    if isinstance(value, Tensor | torch.Size) or hasattr(value, "tolist"):
        value = value.tolist()
    problem = task.problem_type
    if problem == "regression":
        return torch.tensor(read_number(value), dtype=torch.float32)
    if problem == "multi_label_classification" or (problem is None and is_list(value)):
        return torch.tensor(class_vector(task, value), dtype=torch.float32)
    return torch.tensor(class_number(task, value))


def read_number(value: Any) -> Any:  # Any: a number or a list of numbers
    try:
        return [float(part) for part in value] if is_list(value) else float(value)
    except (TypeError, ValueError):
        raise DataError(f"the label {value!r} is no number", "expected: a number") from None


def class_vector(task: "HuggingFaceTask", value: Any) -> list[float]:  # Any: the user's label
    """One number per class: 1 for each class that the example has."""
    count = task.config.num_labels
    if not is_list(value):
        raise DataError(
            f"the label {value!r} is no list", f"expected: {count} numbers, or names of classes"
        )
    if len(value) == count and all(isinstance(part, int | float) for part in value):
        return [float(part) for part in value]
    vector = [0.0] * count
    for part in value:
        vector[class_number(task, part)] = 1.0
    return vector


def class_number(task: "HuggingFaceTask", value: Any) -> int:  # Any: the user's label
    """The number of a class, given as a number or by its name. Raises DataError."""
    names = {str(name): int(number) for name, number in (task.config.label2id or {}).items()}
    if isinstance(value, str) and value in names:
        return names[value]
    try:
        number = int(value)
        if number != float(value) or not 0 <= number < task.config.num_labels:
            raise ValueError
    except (TypeError, ValueError):
        raise DataError(
            f"the label {value!r} is no class of the model",
            f"expected: a number from 0 to {task.config.num_labels - 1}, or: {listed(list(names))}",
            "give the names in the order of the classes: Task(label_names=[...])",
        ) from None
    return number


def label_text(task: "HuggingFaceTask", example: Mapping[str, Any]) -> str | None:
    labels = example.get("labels")
    if labels is None or task.kind in ("causal-lm", "masked-lm", "token-classification"):
        return None
    if task.kind == "seq2seq-lm":
        return str(task.tokenizer.decode(labels, skip_special_tokens=True))
    names = task.config.id2label or {}
    if task.problem_type == "regression":
        return ", ".join(f"{value:g}" for value in labels.reshape(-1).tolist())
    if labels.dim():
        return ", ".join(str(names.get(int(number), number)) for number in labels.nonzero()[:, 0])
    number = int(labels)
    has_names = names.get(0) != GENERIC
    return str(names.get(number, number)) if has_names else str(number)


def is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
