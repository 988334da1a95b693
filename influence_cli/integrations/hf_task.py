"""A fine-tuned Hugging Face model, its data and its loss, for the functions of a definition.py."""

import contextlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import DataError, DefinitionError, listed
from influence_cli.integrations import hf_encoding as encoding
from influence_cli.integrations import hf_losses as losses
from influence_cli.integrations import hf_model
from influence_cli.integrations.extras import import_library
from influence_cli.integrations.hf_encoding import Example, Row


@dataclass(frozen=True)
class TaskKind:
    """A kind of task: its class of transformers, its loss, and how the loss is normalised.

    `draw`: draws labels from logits; None: not for this kind.
    """

    auto_class: str
    loss: losses.LossRule
    normalise: str = "example"
    is_text: bool = True
    draw: losses.DrawRule | None = None


KINDS = {
    "sequence-classification": TaskKind("AutoModelForSequenceClassification", losses.class_losses),
    "token-classification": TaskKind(
        "AutoModelForTokenClassification", losses.token_losses, draw=losses.draw_tokens
    ),
    "causal-lm": TaskKind(
        "AutoModelForCausalLM", losses.causal_losses, "token", draw=losses.draw_next_tokens
    ),
    "seq2seq-lm": TaskKind("AutoModelForSeq2SeqLM", losses.token_losses, "token"),
    "masked-lm": TaskKind(
        "AutoModelForMaskedLM", losses.token_losses, "token", draw=losses.draw_tokens
    ),
    "image-classification": TaskKind(
        "AutoModelForImageClassification", losses.class_losses, is_text=False
    ),
}
CLASSIFICATION = ("sequence-classification", "image-classification")
PROBLEMS = {
    "regression": losses.regression_losses,
    "single_label_classification": losses.class_losses,
    "multi_label_classification": losses.multi_label_losses,
}


@dataclass(frozen=True)
class HuggingFaceTask:
    """What a definition.py asks of a Hugging Face run.

    `kind`: one of KINDS. `folder`: a checkpoint folder with config.json, or with
    adapter_config.json. `base`: the base model's folder of an adapter. `text`: columns of the
    text, of a pair of texts, of prompt and completion, or of source and target. `label`, `image`,
    `id`: columns. `label_names`: the names of the classes in the order of their numbers, where
    config.json has none. `max_length`: longer texts are cut, in tokens. `normalise`: "example" or
    "token" (hf_losses.py). `end_of_text`: whether each text ends with the tokenizer's end token.
    `pad_to_multiple_of`: that of the data collator in training, for recorded dropout masks.
    """

    kind: str
    folder: Path
    text: Sequence[str] = ()
    label: str | None = None
    image: str | None = None
    id: str | None = None
    base: Path | None = None
    label_names: Sequence[str] | None = None
    max_length: int | None = None
    normalise: str | None = None
    end_of_text: bool = False
    mask_probability: float = 0.15
    mask_seed: int = 0
    dtype: torch.dtype = torch.float32
    pad_to_multiple_of: int = 1

    def __post_init__(self) -> None:
        """Raises DefinitionError for an unknown kind or normalisation."""
        if self.kind not in KINDS:
            raise DefinitionError(f"Task({self.kind!r})", f"expected: {', '.join(KINDS)}")
        if self.normalise not in (None, "example", "token"):
            raise DefinitionError(
                f"Task(normalise={self.normalise!r})", 'expected: "example" or "token"'
            )

    # ------------------------------------------------------------ the model
    @property
    def is_adapter(self) -> bool:
        return hf_model.is_adapter_folder(self.folder)

    @cached_property
    def base_folder(self) -> Path:
        """The folder with config.json."""
        return hf_model.find_base(self.folder, self.base) if self.is_adapter else self.folder

    @cached_property
    def config(self) -> Any:  # Any: a PretrainedConfig
        changes: dict[str, Any] = {}
        if self.label_names is not None:
            changes = {"id2label": dict(enumerate(self.label_names))}
            changes["label2id"] = {name: number for number, name in enumerate(self.label_names)}
        elif self.is_adapter and (size := hf_model.read_head_size(self.folder)):
            changes = {"num_labels": size}  # the base model's config knows nothing of the task
        return hf_model.load_config(self.base_folder, **changes)

    def model(self) -> Any:  # Any: a PreTrainedModel or PeftModel
        """The model in float32, without the weights of a checkpoint."""
        name = KINDS[self.kind].auto_class
        if self.is_adapter:
            model = hf_model.build_with_adapter(
                name, self.config, self.base_folder, self.folder, self.dtype
            )
        else:
            model = hf_model.build_from_config(name, self.config, self.dtype)
        if KINDS[self.kind].is_text:
            text_config = inner_model(model).config.get_text_config()
            if getattr(text_config, "pad_token_id", None) is None:
                # finds the ends of a batch's texts; without one, transformers refuses batches
                text_config.pad_token_id = self.pad_id
        return model

    @cached_property
    def tokenizer(self) -> Any:  # Any: a PreTrainedTokenizer
        """Raises DefinitionError where no folder has a tokenizer."""
        transformers = import_library("transformers", "hf")
        places = dict.fromkeys((self.folder, self.folder.parent, self.base_folder))
        names = ("tokenizer_config.json", "tokenizer.json")
        for place in places:
            if any((place / name).is_file() for name in names):
                return transformers.AutoTokenizer.from_pretrained(place, local_files_only=True)
        raise DefinitionError(
            "no tokenizer beside the model",
            f"looked for {' and '.join(names)} in: {listed([str(place) for place in places])}",
            "save it: tokenizer.save_pretrained(FOLDER); or give data with a column input_ids",
        )

    @cached_property
    def processor(self) -> Any:  # Any: an image processor
        """Raises DefinitionError where no folder has an image processor."""
        transformers = import_library("transformers", "hf")
        for place in dict.fromkeys((self.folder, self.folder.parent, self.base_folder)):
            if (place / "preprocessor_config.json").is_file():
                return transformers.AutoImageProcessor.from_pretrained(place, local_files_only=True)
        raise DefinitionError(
            "no preprocessor_config.json beside the model",
            f"looked in: {self.folder} and {self.folder.parent}",
            "save it: image_processor.save_pretrained(FOLDER)",
        )

    @cached_property
    def pad_id(self) -> int | None:
        """The padding token, or the end token; None where no file of the model names one."""
        text_config = self.config.get_text_config()
        numbers = [getattr(text_config, f"{name}_token_id", None) for name in ("pad", "eos")]
        with contextlib.suppress(DefinitionError):  # tokenised data needs no tokenizer
            numbers.insert(1, self.tokenizer.pad_token_id)
        return next((number for number in numbers if isinstance(number, int)), None)

    # ------------------------------------------------------------ the data
    def examples(self, rows: Any) -> "EncodedRows":  # Any: a sequence of rows
        """A dataset of the examples of these rows, encoded when they are read."""
        return EncodedRows(rows, self)

    def example(self, row: Row) -> Example:
        """One example of a row: tensors by the names of the model's arguments, and `labels` where
        the row has a label.
        """
        from influence_cli.integrations.hf_rows import encode_row

        return encode_row(self, row)

    def collate(self, items: list[Example]) -> dict[str, Tensor]:
        """A batch, padded to its longest text. Padding changes no loss."""
        pad_id = self.pad_id if KINDS[self.kind].is_text else None
        # attention hides padding, whatever it is
        return encoding.pad_batch(items, pad_id or 0, self.pad_to_multiple_of)

    def relabel(self, example: Example, label: object) -> Example:
        """The example with another label: a number, or a class name."""
        from influence_cli.integrations.hf_rows import label_tensor

        return {**example, "labels": label_tensor(self, label)}

    # ------------------------------------------------------------ loss and measures
    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """The logits: (B, C) of classes, (B, S, V) of tokens."""
        return self._call(model, batch).logits

    def loss_from_outputs(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """(B,) one loss per example."""
        if "labels" not in batch:
            raise DataError(
                "a batch has no labels", "expected: a label in each row, or Task(label=COLUMN)"
            )
        normalise = self.normalise or KINDS[self.kind].normalise
        return self._loss_rule(batch["labels"])(outputs, batch["labels"], normalise)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B,) one loss per example."""
        return self.loss_from_outputs(self.outputs(model, batch), batch)

    def measure_tokens(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, S) minus what each label token adds to the loss, at its position."""
        if self.kind not in ("causal-lm", "seq2seq-lm"):
            raise DefinitionError(
                f"Task.measure_tokens does not measure tokens of {self.kind}",
                "expected: causal-lm, seq2seq-lm",
            )
        normalise = self.normalise or KINDS[self.kind].normalise
        logits_BSV = self.outputs(model, batch)
        is_causal = self.kind == "causal-lm"
        return losses.label_measures(logits_BSV, batch["labels"], normalise, is_causal)

    def sample(
        self, outputs: Tensor, batch: dict[str, Tensor], generator: torch.Generator
    ) -> dict[str, Tensor]:
        """The batch with a label drawn from the model for each token that has one."""
        draw = KINDS[self.kind].draw
        if draw is None:
            raise DefinitionError(
                f"Task.sample does not draw labels of {self.kind}",
                f"expected: {', '.join(name for name, kind in KINDS.items() if kind.draw)}",
            )
        return batch | {"labels": draw(outputs, batch["labels"], generator)}

    def features(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """(B, F) the last hidden state, mean over tokens without padding."""
        outputs = self._call(model, batch, output_hidden_states=True)
        hidden = getattr(outputs, "encoder_last_hidden_state", None)
        hidden = outputs.hidden_states[-1] if hidden is None else hidden
        if hidden.dim() == 4:  # (B, F, H, W) of a convolutional network
            return hidden.flatten(2).mean(2)
        mask_BS = batch.get("attention_mask")
        if mask_BS is None or mask_BS.shape != hidden.shape[:2]:
            return hidden.mean(1)
        weights_BS1 = mask_BS[:, :, None].to(hidden.dtype)
        return (hidden * weights_BS1).sum(1) / weights_BS1.sum(1)

    def _call(self, model: Any, batch: dict[str, Tensor], **options: Any) -> Any:
        """The model's outputs, with every column that its forward takes."""
        inner = inner_model(model)
        accepted = inspect.signature(inner.forward).parameters
        inputs = {
            name: value for name, value in batch.items() if name in accepted and name != "labels"
        }
        if inner.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
            if "labels" not in batch:
                raise DataError("a batch has no labels", "expected: the column of the target text")
            shifted = inner.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
            inputs["decoder_input_ids"] = shifted
        return model(**inputs, **options)

    def _loss_rule(self, labels: Tensor) -> losses.LossRule:
        if self.kind not in CLASSIFICATION:
            return KINDS[self.kind].loss
        return PROBLEMS[self.problem_type or infer_problem(labels)]

    @property
    def problem_type(self) -> str | None:
        """ "regression", "single_label_classification", "multi_label_classification", or None
        where only the labels tell it.
        """
        problem = self.config.problem_type
        if problem is None and self.config.num_labels == 1:
            return "regression"
        return str(problem) if problem is not None else None

    # ------------------------------------------------------------ texts for people
    def label_text(self, example: Example) -> str | None:
        """The label's name; None where the example has none."""
        from influence_cli.integrations.hf_rows import label_text

        return label_text(self, example)

    def describe(self, example: Example) -> str:
        """The texts of the row, else the decoded tokens."""
        if "text" in example:
            return str(example["text"])
        if "input_ids" in example:
            return str(self.tokenizer.decode(example["input_ids"], skip_special_tokens=True))
        return ""

    def picture(self, example: Example) -> Tensor | None:
        """(C, H, W) from 0 to 1: what the model sees. None without an image processor."""
        try:
            return encoding.decode_image(self.processor, example["pixel_values"])
        except DefinitionError:  # data that is encoded already needs none
            return None

    def token(self, id: int) -> str:
        """The text of a token."""
        text = self.tokenizer.convert_ids_to_tokens(id)
        return str(id) if text is None else str(text)


class EncodedRows:
    """Rows as examples, encoded when they are read."""

    def __init__(self, rows: Any, task: HuggingFaceTask) -> None:  # Any: a sequence of rows
        self.rows, self.task = rows, task

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        return self.task.example(self.rows[index])


def inner_model(model: Any) -> Any:  # Any: a PreTrainedModel, maybe within peft's
    """The model of transformers."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def infer_problem(labels: Tensor) -> str:
    """As transformers does where config.json has no problem_type."""
    kind = "multi" if labels.is_floating_point() or labels.dim() > 1 else "single"
    return f"{kind}_label_classification"
