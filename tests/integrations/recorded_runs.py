"""Small trainings by transformers' Trainer, recorded by `huggingface.record`."""

from pathlib import Path
from typing import Any

from tests.integrations import hf_runs

ROWS = 26


def bert_model(**options: Any):
    import torch
    from transformers import BertForSequenceClassification

    torch.manual_seed(0)
    names = dict(enumerate(hf_runs.PAIR_LABELS))
    return BertForSequenceClassification(
        hf_runs.bert_config(id2label=names, label2id={v: k for k, v in names.items()}, **options)
    )


def bert_rows(tokenizer) -> list[dict]:
    return [
        {
            **tokenizer(row["premise"], row["hypothesis"]),
            "label": hf_runs.PAIR_LABELS.index(row["label"]),
        }
        for row in hf_runs.pair_rows(ROWS, 1)
    ]


def lora_model(folder: Path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, BertModel

    torch.manual_seed(0)
    BertModel(hf_runs.bert_config()).save_pretrained(folder / "base")
    hf_runs.word_tokenizer(pair=True).save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
    options = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
    return get_peft_model(
        base, LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier"], **options)
    )


def gpt2_model(**options: Any):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32, "initializer_range": 0.2}
    vocabulary = len(hf_runs.SPECIAL + hf_runs.WORDS)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=vocabulary, bos_token_id=3, eos_token_id=3, pad_token_id=0, **sizes)
    )


def build_trainer(
    folder: Path, model, rows, collator, tokenizer, kind=None, eval_rows=None, **arguments: Any
):
    """A Trainer that writes into folder/out. `kind`: the class, where it is not Trainer."""
    from transformers import Trainer, TrainingArguments

    options = {
        "num_train_epochs": 2, "save_strategy": "epoch", "logging_steps": 3, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "report_to": [], "use_cpu": True, "seed": 0, "disable_tqdm": True,
    } | arguments  # fmt: skip
    return (kind or Trainer)(
        model,
        TrainingArguments(str(folder / "out"), **options),
        train_dataset=rows,
        eval_dataset=eval_rows,
        data_collator=collator,
        processing_class=tokenizer,
    )


def bert_trainer(folder: Path, model=None, rows=None, collator=None, kind=None, **arguments: Any):
    """A BERT classifier of sentence pairs, with dropout 0.1, AdamW, clipping, a linear schedule."""
    from transformers import DataCollatorWithPadding

    tokenizer = hf_runs.word_tokenizer(pair=True)
    hf_runs.write_rows(folder, hf_runs.pair_rows, ROWS)
    return build_trainer(
        folder,
        model or bert_model(),
        bert_rows(tokenizer) if rows is None else rows,
        collator or DataCollatorWithPadding(tokenizer),
        tokenizer,
        kind,
        **arguments,
    )


def lora_trainer(folder: Path, **arguments: Any):
    from transformers import DataCollatorWithPadding

    tokenizer = hf_runs.word_tokenizer(pair=True)
    hf_runs.write_rows(folder, hf_runs.text_rows, ROWS)
    rows = [{**tokenizer(r["text"]), "label": r["label"]} for r in hf_runs.text_rows(ROWS, 1)]
    collator = DataCollatorWithPadding(tokenizer)
    return build_trainer(folder, lora_model(folder), rows, collator, tokenizer, **arguments)


def gpt2_trainer(folder: Path, **arguments: Any):
    """A language model whose rows are a datasets.Dataset with a column that forward does not take."""
    import datasets
    from transformers import DataCollatorForLanguageModeling

    def texts(number: int, seed: int) -> list[dict]:
        return [{"text": text} for text in hf_runs.sentences(number, seed)]

    tokenizer = hf_runs.word_tokenizer(eos_token="[SEP]")
    hf_runs.write_rows(folder, texts, ROWS)
    rows = datasets.Dataset.from_list([{**r, **tokenizer(r["text"])} for r in texts(ROWS, 1)])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    return build_trainer(folder, gpt2_model(), rows, collator, tokenizer, **arguments)
