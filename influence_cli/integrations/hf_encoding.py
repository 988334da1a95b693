"""From a row of columns to an example: a dict of tensors by the names of the model's arguments.

Texts are tokenised as the tokenizer of the run does it. Rows that hold `input_ids` or
`pixel_values` already are used as they are.
"""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from influence_cli.errors import DataError, listed
from influence_cli.integrations.extras import import_library
from influence_cli.integrations.hf_losses import IGNORED

Row = Mapping[str, Any]  # Any: the user's columns
Example = dict[str, Any]  # tensors, and texts for people
MODEL_INPUTS = ("input_ids", "pixel_values")
LABELS = ("labels", "label", "label_ids")
MASKED, RANDOM = 0.8, 0.1  # shares of the chosen tokens that BERT's recipe replaces


def is_encoded(row: Row) -> bool:
    return any(name in row for name in MODEL_INPUTS)


def encoded_columns(row: Row) -> Example:
    """The numeric columns of a row that is tokenised already; `label` becomes `labels`."""
    example: Example = {}
    for name, value in row.items():
        if value is None or isinstance(value, str | bytes | Mapping):
            continue
        try:
            example["labels" if name in LABELS else name] = torch.as_tensor(value)
        except (ValueError, TypeError, RuntimeError):  # texts, ragged lists
            continue
    return example


def read_column(row: Row, name: str) -> Any:  # Any: the user's value
    """Raises DataError for a column that the row lacks."""
    if name not in row:
        raise DataError(
            f"a row has no column {name}", f"found: {listed(list(row))}", "name another column"
        )
    return row[name]


def read_texts(row: Row, columns: Sequence[str]) -> list[Any]:  # Any: a text, or chat messages
    """Raises DataError for a missing or empty column."""
    values = [read_column(row, name) for name in columns]
    for name, value in zip(columns, values, strict=True):
        if value is None or not isinstance(value, str | list):
            raise DataError(
                f"column {name} holds a {type(value).__name__}", "expected: a text in each row"
            )
    return values


def encode_text(tokenizer: Any, texts: list[Any], max_length: int | None) -> Example:
    """Tokenises a text or a pair of texts, with all columns that the tokenizer returns."""
    encoded = tokenizer(*texts, truncation=max_length is not None, max_length=max_length)
    return {name: torch.tensor(values) for name, values in encoded.items()}


def encode_continuation(
    tokenizer: Any, texts: list[Any], max_length: int | None, end_of_text: bool
) -> Example:
    """For causal language models: one text, a chat, or a prompt and its completion.

    Labels are the tokens themselves; those of the prompt have no loss.
    """
    prompt, text = ("", texts[0]) if len(texts) == 1 else (texts[0], "".join(texts))
    if isinstance(text, list):
        encoded = tokenizer.apply_chat_template(text, tokenize=True, return_dict=True)
        ids = list(encoded["input_ids"])
    else:
        ids = list(tokenizer(text)["input_ids"])
    if end_of_text and tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    ids = ids[:max_length] if max_length is not None else ids
    labels = torch.tensor(ids)
    if prompt:
        labels = labels.clone()
        labels[: len(strip_end(tokenizer, tokenizer(prompt)["input_ids"]))] = IGNORED
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.ones(len(ids), dtype=torch.int64),
        "labels": labels,
    }


def strip_end(tokenizer: Any, ids: list[int]) -> list[int]:
    """Without the end token that some tokenizers add."""
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def encode_words(
    tokenizer: Any, words: list[str], labels: list[int] | None, max_length: int | None
) -> Example:
    """For token classification: the first token of a word has its label, others have none."""
    encoded = tokenizer(
        words, is_split_into_words=True, truncation=max_length is not None, max_length=max_length
    )
    example = {name: torch.tensor(values) for name, values in encoded.items()}
    if labels is not None:
        numbers, previous = [], None
        for word in encoded.word_ids():
            is_first = word is not None and word != previous
            numbers.append(labels[word] if is_first else IGNORED)
            previous = word
        example["labels"] = torch.tensor(numbers)
    return example


def mask_tokens(
    tokenizer: Any, example: Example, probability: float, seed: int, vocabulary: int
) -> Example:
    """For masked language models: hides tokens, the same ones each time.

    The random numbers depend on the seed and the text alone. At least one token is hidden.
    """
    ids = example["input_ids"]
    special = torch.tensor(
        tokenizer.get_special_tokens_mask(ids.tolist(), already_has_special_tokens=True)
    ).bool()
    generator = torch.Generator().manual_seed(zlib.crc32(ids.numpy().tobytes(), seed))
    draws = torch.rand(len(ids), generator=generator).masked_fill(special, 2.0)
    chosen = (draws < probability) & ~special
    if not chosen.any() and not special.all():
        chosen[draws.argmin()] = True
    kinds = torch.rand(len(ids), generator=generator)
    random_ids = torch.randint(vocabulary, (len(ids),), generator=generator)
    masked = torch.where(chosen & (kinds < MASKED), tokenizer.mask_token_id, ids)
    random = chosen & (kinds >= MASKED) & (kinds < MASKED + RANDOM)
    return {
        **example,
        "input_ids": torch.where(random, random_ids, masked),
        "labels": torch.where(chosen, ids, IGNORED),
    }


def encode_image(processor: Any, image: Any) -> Tensor:
    """The pixel values of a picture: a path, bytes, an array (H, W) or (H, W, C), or PIL's."""
    return processor(open_image(image), return_tensors="pt")["pixel_values"][0]


def decode_image(processor: Any, pixels_CHW: Tensor) -> Tensor:
    """(C, H, W) from 0 to 1: the pixel values without the processor's normalisation."""
    pixels_CHW = pixels_CHW.float()
    if processor.do_normalize:
        mean, std = (torch.tensor(x) for x in (processor.image_mean, processor.image_std))
        pixels_CHW = pixels_CHW * std[:, None, None] + mean[:, None, None]
    if not processor.do_rescale:
        pixels_CHW = pixels_CHW / 255
    return pixels_CHW.clamp(0, 1)  # rounding


def open_image(image: Any) -> Any:  # Any: a PIL image
    """Raises DataError for what is no picture."""
    pil = import_library("PIL.Image", "hf")
    try:
        if isinstance(image, Mapping):  # datasets and Parquet: {"bytes": ..., "path": ...}
            image = image.get("bytes") or image.get("path")
        if isinstance(image, bytes):
            import io

            image = pil.open(io.BytesIO(image))
        elif isinstance(image, str | Path):
            image = pil.open(image)
        elif not hasattr(image, "convert"):
            image = pil.fromarray(torch.as_tensor(image).to(torch.uint8).numpy())
        return image.convert("RGB")
    except (OSError, TypeError, ValueError) as error:
        raise DataError(
            f"a picture can't be read: {error}",
            "expected: a file name, bytes of a PNG or JPEG file, or an array of 0 to 255",
        ) from error


# ---------------------------------------------------------------- batches
def pad_batch(examples: list[Example], pad_id: int, multiple: int = 1) -> dict[str, Tensor]:
    """Stacks the tensors of the examples, padded on the right to the longest, or to the next
    `multiple`.

    Labels are padded with -100, tokens with `pad_id`, everything else with 0. Padded tokens are
    hidden from attention, also where the examples bring no attention_mask.
    """
    names = [
        name
        for name in examples[0]
        if all(isinstance(example.get(name), Tensor) for example in examples)
    ]
    lengths = [len(example["input_ids"]) for example in examples if "input_ids" in example]
    if len(set(lengths)) > 1 and "attention_mask" not in names:
        examples = [
            {**example, "attention_mask": torch.ones_like(example["input_ids"])}
            for example in examples
        ]
        names.append("attention_mask")
    pads = {"input_ids": pad_id, "labels": IGNORED, "decoder_input_ids": pad_id}
    return {
        name: stack_padded([example[name] for example in examples], pads.get(name, 0), multiple)
        for name in names
    }


def stack_padded(tensors: list[Tensor], pad: int, multiple: int) -> Tensor:
    """(B, S, ...) of tensors (S_i, ...), padded to one length where the lengths differ."""
    if len({tensor.shape for tensor in tensors}) == 1:
        return torch.stack(tensors)
    longest = -(-max(map(len, tensors)) // multiple) * multiple
    rows = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), pad)
    for row, tensor in zip(rows, tensors, strict=True):
        row[: len(tensor)] = tensor
    return rows
