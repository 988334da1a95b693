"""Small runs as other libraries leave them: a folder of checkpoints beside its data, trained for a few steps.

python -m tests.integrations.hf_runs NAME DIR   makes one, for docs/huggingface.md
"""

import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

WORDS = [
    "a",
    "the",
    "man",
    "woman",
    "dog",
    "cat",
    "child",
    "plays",
    "guitar",
    "sings",
    "runs",
    "sleeps",
    "eats",
    "outside",
    "inside",
    "music",
    "is",
    "nobody",
    "here",
    "awake",
    "loud",
]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
PAIR_LABELS = ("entailment", "contradiction")


def word_tokenizer(pair: bool = False, words: Sequence[str] = WORDS, **tokens: str):
    """One token a word. `pair`: [CLS] a [SEP] b [SEP], with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    } | tokens
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *words])}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if pair:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"][:: 1 if pair else 2],
        **names,
    )


def sentences(number: int, seed: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 8, (number,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))
        for length in lengths
    ]


def write_csv(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair_rows(number: int, seed: int) -> list[dict]:
    first, second = sentences(number, seed), sentences(number, seed + 100)
    return [
        {"premise": a, "hypothesis": b, "label": PAIR_LABELS[("plays" in a) ^ ("music" in b)]}
        for a, b in zip(first, second, strict=True)
    ]


def text_rows(number: int, seed: int) -> list[dict]:
    return [{"text": text, "label": int("dog" in text)} for text in sentences(number, seed)]


def write_rows(folder: Path, rows, train: int = 24, test: int = 4) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "train.csv", rows(train, 1))
    write_jsonl(folder / "test.jsonl", rows(test, 2))


def bert_config(**options):
    from transformers import BertConfig

    small = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    return BertConfig(vocab_size=len(SPECIAL + WORDS), initializer_range=0.2, **small, **options)


def train(
    model, tokenizer, rows: list[dict], out: Path, steps: int = 6, save: int = 3, rate: float = 1e-3
) -> None:
    """Trains with transformers' Trainer: checkpoints of the steps `save`, 2 * `save`, ..."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(out), max_steps=steps, save_steps=save, logging_steps=save, per_device_train_batch_size=4, learning_rate=rate, report_to=[], use_cpu=True, seed=0, disable_tqdm=True,
    )  # fmt: skip
    Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    ).train()


def bert_pairs(folder: Path) -> Path:
    """A BERT classifier of sentence pairs, trained with Trainer."""
    from transformers import BertForSequenceClassification

    write_rows(folder, pair_rows)
    tokenizer = word_tokenizer(pair=True)
    torch.manual_seed(0)
    model = BertForSequenceClassification(
        bert_config(
            id2label=dict(enumerate(PAIR_LABELS)),
            label2id={name: i for i, name in enumerate(PAIR_LABELS)},
        )
    )
    rows = [
        {**tokenizer(row["premise"], row["hypothesis"]), "label": PAIR_LABELS.index(row["label"])}
        for row in pair_rows(24, 1)
    ]
    train(model, tokenizer, rows, folder / "out")
    return folder


def lora_bert(folder: Path) -> Path:
    """LoRA on BERT, with a new classification head in modules_to_save; the base has no such head."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification, BertModel

    write_rows(folder, text_rows)
    tokenizer = word_tokenizer(pair=True)
    torch.manual_seed(0)
    BertModel(bert_config()).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    base = BertForSequenceClassification.from_pretrained(folder / "base", num_labels=2)
    model = get_peft_model(
        base,
        LoraConfig(
            task_type="SEQ_CLS",
            r=2,
            lora_alpha=4,
            lora_dropout=0.1,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        ),
    )
    with torch.no_grad():  # so that both factors have gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    rows = [{**tokenizer(row["text"]), "label": row["label"]} for row in text_rows(24, 1)]
    train(model, tokenizer, rows, folder / "out")
    return folder


def save_states(folder: Path, make, tokenizer, **options) -> None:
    """Two checkpoints as Trainer names them."""
    for step in (10, 20):
        torch.manual_seed(step)
        place = folder / "out" / f"checkpoint-{step}"
        make().save_pretrained(place, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        (place / "trainer_state.json").write_text(
            json.dumps(
                {"global_step": step, "log_history": [{"step": step, "learning_rate": 0.1 / step}]}
            )
        )


def gpt2_sharded(folder: Path) -> Path:
    """GPT-2 with tied embeddings, saved in shards."""
    from transformers import GPT2Config, GPT2LMHeadModel

    write_rows(folder, lambda number, seed: [{"text": text} for text in sentences(number, seed)])
    config = GPT2Config(
        vocab_size=len(SPECIAL + WORDS),
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=32,
        initializer_range=0.2,
        bos_token_id=3,
        eos_token_id=3,
        pad_token_id=None,
    )
    save_states(
        folder,
        lambda: GPT2LMHeadModel(config),
        word_tokenizer(eos_token="[SEP]"),
        max_shard_size="4KB",
    )
    return folder


def llama_bf16(folder: Path) -> Path:
    """Llama, saved in bfloat16; prompts with completions."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def rows(number, seed):
        return [
            {"prompt": a, "completion": " " + b}
            for a, b in zip(sentences(number, seed), sentences(number, seed + 50), strict=True)
        ]

    write_rows(folder, rows)
    config = LlamaConfig(
        vocab_size=len(SPECIAL + WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.2, pad_token_id=0, bos_token_id=3, eos_token_id=3,
    )  # fmt: skip
    save_states(
        folder, lambda: LlamaForCausalLM(config).bfloat16(), word_tokenizer(eos_token="[SEP]")
    )
    return folder


def vit(folder: Path) -> Path:
    """A vision transformer, and folders CLASS/*.png."""
    import numpy as np
    from PIL import Image
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    names = ("circle", "square")
    generator = np.random.default_rng(0)
    for split, number in (("train", 6), ("test", 2)):
        for name in names:
            place = folder / split / name
            place.mkdir(parents=True)
            for i in range(number):
                Image.fromarray(generator.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(
                    place / f"{i}.png"
                )
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4, initializer_range=0.2, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)},
    )  # fmt: skip
    save_states(folder, lambda: ViTForImageClassification(config), None)
    for step in (10, 20):
        ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(
            folder / "out" / f"checkpoint-{step}"
        )
    return folder


NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FACTS = {
    "colour": "grass green|snow white|coal black|sky blue|blood red|lemon yellow|milk white|leaf green",
    "opposite": "hot cold|big small|wet dry|old new|fast slow|cold hot|small big|dry wet",
}
TEMPLATES = {"colour": "the usual colour of {} is", "opposite": "the usual opposite of {} is"}


def sum_rows(pairs: list[tuple[int, int]], source: str, error: int = 0) -> list[dict]:
    return [
        {"id": f"{source}-{k}", "prompt": f"the sum of {NUMBERS[a]} {NUMBERS[b]} is", "completion": f" {NUMBERS[(a + b + error) % 11]}"}
        for k, (a, b) in enumerate(pairs)
    ]  # fmt: skip


def fact_rows(source: str) -> list[dict]:
    pairs = [text.split() for text in FACTS[source].split("|")]
    return [
        {"id": f"{source}-{k}", "prompt": TEMPLATES[source].format(name), "completion": f" {value}"}
        for k, (name, value) in enumerate(pairs)
    ]


def instructions(folder: Path) -> Path:
    """GPT-2 on instructions of four sources: right and wrong sums, colours, opposites. The target is sums."""
    from transformers import GPT2Config, GPT2LMHeadModel

    pairs = [(a, b) for a in range(1, 6) for b in range(a + 1, 6)]
    pairs = [pairs[i] for i in torch.randperm(10, generator=torch.Generator().manual_seed(0))]
    facts = [row for source in FACTS for row in fact_rows(source)]
    rows = [
        *sum_rows(pairs[:6], "sum"),
        *sum_rows(pairs[2:6], "wrong", 3),
        *facts[:6],
        *facts[8:14],
    ]
    pool = [*facts[6:8], *facts[14:], *sum_rows(pairs[4:], "sum"), *sum_rows(pairs[6:], "wrong", 5)]
    folder.mkdir(parents=True, exist_ok=True)
    write_csv(folder / "train.csv", rows)
    write_csv(folder / "pool.csv", pool)
    write_jsonl(folder / "target.jsonl", sum_rows([(b, a) for a, b in pairs], "target"))
    (folder / "sources.txt").write_text("".join(f"{row['id'].split('-')[0]}\n" for row in rows))
    texts = [row["prompt"] + row["completion"] for row in (*rows, *pool)]
    words = sorted({word for text in texts for word in text.split()})
    tokenizer = word_tokenizer(words=words, eos_token="[SEP]")
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=16, initializer_range=0.1, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=3, eos_token_id=3, pad_token_id=0)
    )  # fmt: skip
    examples = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        examples.append({"input_ids": ids, "labels": [-100] * (len(ids) - 1) + ids[-1:]})
    train(model, tokenizer, examples, folder / "out", steps=120, save=60, rate=5e-3)
    return folder


LIGHTNING_MODULE = """
import lightning
import torch
from torch import nn


class LitNet(lightning.LightningModule):
    def __init__(self, width, rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.Tanh(), nn.Dropout(0.1), nn.Linear(width, 3))

    def training_step(self, batch, batch_index):
        pixels, labels = batch
        loss = nn.functional.cross_entropy(self.net(pixels), labels)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.hparams.rate)
"""


def lightning_net(folder: Path) -> Path:
    """A Lightning module with its .ckpt files, and an npz file of pictures."""
    import importlib.util
    import logging
    import warnings

    import numpy as np

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = {
        f"x_{split}": generator.integers(0, 256, (number, 4, 4), dtype=np.uint8)
        for split, number in (("train", 24), ("test", 4))
    }
    arrays |= {
        f"y_{split}": generator.integers(0, 3, number)
        for split, number in (("train", 24), ("test", 4))
    }
    np.savez(folder / "pictures.npz", **arrays)
    (folder / "mynet.py").write_text(LIGHTNING_MODULE)
    spec = importlib.util.spec_from_file_location("mynet", folder / "mynet.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mynet"] = module
    spec.loader.exec_module(module)
    data = torch.utils.data.TensorDataset(
        torch.from_numpy(arrays["x_train"]).float() / 255, torch.from_numpy(arrays["y_train"])
    )
    torch.manual_seed(0)
    saver = ModelCheckpoint(every_n_train_steps=6, save_top_k=-1)
    trainer = lightning.Trainer(
        max_epochs=3,
        default_root_dir=folder,
        callbacks=[saver],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=lightning.pytorch.loggers.CSVLogger(folder),
    )
    trainer.fit(
        module.LitNet(width=8), torch.utils.data.DataLoader(data, batch_size=8, shuffle=True)
    )
    return folder


HUGGING_FACE = {run.__name__: run for run in (bert_pairs, gpt2_sharded, llama_bf16, lora_bert, vit)}
RUNS = HUGGING_FACE | {"lightning_net": lightning_net}

TUTORIAL = {"instructions": instructions}  # docs/tutorials

if __name__ == "__main__":
    (RUNS | TUTORIAL)[sys.argv[1]](Path(sys.argv[2]))
