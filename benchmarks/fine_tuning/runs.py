"""The trainings: default BERT and LoRA fine-tuning by Trainer, a Lightning run, and a plain loop.

Each function trains in a folder and returns the run folder, with its definition.
"""

import csv
import gzip
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import numpy as np
import torch

from influence_cli import TrajectoryRecorder, huggingface

HERE = Path(__file__).parent
TRAIN, QUERIES, TOKENS = 400, 40, 32


# ---------------------------------------------------------------- texts
def read_texts(data: Path) -> list[dict[str, Any]]:
    with gzip.open(data / "subjectivity.csv.gz", "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    order = np.random.default_rng(0).permutation(len(rows))
    return [
        {"text": rows[i]["text"], "label": int(rows[i]["label"] == "subjective")} for i in order
    ]


def word_tokenizer(texts: list[str], size: int = 2000) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    special |= {"sep_token": "[SEP]", "mask_token": "[MASK]"}
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=size, special_tokens=list(special.values()))
    )
    ends = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=ends
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=TOKENS, **special)


def bert_config(layers: int = 2, width: int = 64, vocabulary: int = 2000) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=4 * width, max_position_embeddings=2 * TOKENS, num_labels=2,
    )  # fmt: skip


def write_tables(folder: Path, rows: list[dict[str, Any]]) -> None:
    for name, part in (("train.csv", rows[:TRAIN]), ("queries.csv", rows[TRAIN : TRAIN + QUERIES])):
        with (folder / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ("text", "label"))
            writer.writeheader()
            writer.writerows(part)


def build_trainer(
    folder: Path, model: Any, tokenizer: Any, rows: list[dict], **options: Any
) -> Any:
    """Trainer's defaults: AdamW, dropout 0.1, gradients clipped at 1, a linear schedule."""
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    encoded = [{**tokenizer(r["text"], truncation=True), "label": r["label"]} for r in rows]
    arguments = {
        "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 5e-4,
        "save_strategy": "steps", "save_steps": 25, "report_to": [], "use_cpu": True, "disable_tqdm": True,
    } | options  # fmt: skip
    return Trainer(
        model,
        TrainingArguments(str(folder / "out"), **arguments),
        train_dataset=encoded,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
    )


def init(folder: Path, run: str, *flags: str) -> Path:
    """The run folder, with the definition that `influence init` writes."""
    from typer.testing import CliRunner

    from influence_cli import cli

    cli.register()
    before = Path.cwd()
    os.chdir(folder)
    try:
        done = CliRunner().invoke(cli.app, ["init", run, *flags])
    finally:
        os.chdir(before)
    if done.exit_code:
        sys.exit(f"influence init: {done.output} {done.exception}")
    return folder / run


def bert(data: Path, folder: Path) -> Path:
    from transformers import BertForSequenceClassification

    rows = read_texts(data)
    write_tables(folder, rows)
    tokenizer = word_tokenizer([row["text"] for row in rows[:TRAIN]])
    torch.manual_seed(0)
    model = BertForSequenceClassification(bert_config())
    trainer = build_trainer(folder, model, tokenizer, rows[:TRAIN])
    huggingface.record(trainer)
    trainer.train()
    return init(folder, "out", "--data", "train.csv", "--query-data", "queries.csv")


def lora(data: Path, folder: Path) -> Path:
    """The base was trained on other texts."""
    from peft import LoraConfig, get_peft_model
    from transformers import BertForSequenceClassification

    rows = read_texts(data)
    write_tables(folder, rows)
    others = rows[1000:3000]
    tokenizer = word_tokenizer([row["text"] for row in others])
    torch.manual_seed(0)
    base = BertForSequenceClassification(bert_config())
    build_trainer(folder / "before", base, tokenizer, others, save_strategy="no").train()
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["query", "value"]}
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", **options))
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    trainer = build_trainer(folder, model, tokenizer, rows[:TRAIN])
    huggingface.record(trainer)
    trainer.train()
    return init(folder, "out", "--data", "train.csv", "--query-data", "queries.csv")


# ---------------------------------------------------------------- pictures and letters
def lightning_run(data: Path, folder: Path) -> Path:
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    import lightning

    from influence_cli.lightning import Recorder

    with np.load(data / "fashion_mnist_15k.npz") as arrays:
        parts = {
            f"{k}_{s}": arrays[f"{k}_{s}"][:n]
            for s, n in (("train", TRAIN), ("test", QUERIES))
            for k in "xy"
        }
    np.savez(folder / "pictures.npz", **parts)
    (folder / "dropout_net.py").write_text((HERE / "dropout_net.py").read_text())
    sys.path.insert(0, str(folder))
    from dropout_net import DropoutNet

    pictures = torch.from_numpy(parts["x_train"]).float() / 255
    pairs = torch.utils.data.TensorDataset(pictures, torch.from_numpy(parts["y_train"]).long())
    torch.manual_seed(0)
    trainer = lightning.Trainer(
        max_epochs=3, default_root_dir=folder, accelerator="cpu", logger=False, gradient_clip_val=1.0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Recorder(folder / "out", checkpoint_every=25)],
    )  # fmt: skip
    trainer.fit(DropoutNet(), torch.utils.data.DataLoader(pairs, batch_size=16, shuffle=True))
    return init(folder, "out", "--model", "dropout_net:DropoutNet", "--data", "pictures.npz")


def loop(data: Path, folder: Path) -> Path:
    """A GPT with dropout, in a loop of one's own."""
    run = folder / "out"
    run.mkdir()
    (run / "definition.py").write_text((HERE / "dropout_gpt.py").read_text())
    letters = gzip.decompress((data / "tinyshakespeare.txt.gz").read_bytes())
    np.save(run / "letters.npy", np.frombuffer(letters, np.uint8)[: 33 * (TRAIN + QUERIES)])
    sys.path.insert(0, str(run))
    import definition

    torch.manual_seed(0)
    model, examples = definition.model(), definition.train_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)
    model.train()
    with TrajectoryRecorder(run, model, optimizer, 25, save_optimizer=True, seed=0) as recorder:
        for _ in range(3):
            for ids in torch.randperm(TRAIN, generator=order).split(16):
                losses = definition.loss(model, torch.stack([examples[i] for i in ids.tolist()]))
                optimizer.zero_grad()
                losses.mean().backward()
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                recorder.step(ids, clip=(1.0 / (norm + 1e-6)).clamp(max=1.0))
                optimizer.step()
    return run


RUNS = {"bert": bert, "lora": lora, "lightning": lightning_run, "loop": loop}


# ---------------------------------------------------------------- cost
def cost_trainer(folder: Path, layers: int, width: int, steps: int) -> Any:
    """A Trainer of random token ids, 16 texts of 32 tokens a step, that saves nothing."""
    from transformers import BertForSequenceClassification, Trainer, TrainingArguments

    generator = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": torch.randint(5, 2000, (TOKENS,), generator=generator), "labels": i % 2}
        for i in range(256)
    ]
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=16, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = Trainer(
        BertForSequenceClassification(bert_config(layers, width)), arguments, train_dataset=rows
    )
    huggingface.record(trainer)
    return trainer


def time_recording(trainer: Any) -> tuple[list[float], list[float]]:
    """CPU seconds by step: of the recorder's functions, without saving checkpoints; of all."""
    from transformers import TrainerCallback

    from influence_cli.integrations import indexed_data, trainer_recording
    from influence_cli.run import forward_seeds, recorder

    spent = {"own": 0.0}
    own: list[float] = []
    complete: list[float] = []
    marks = [time.process_time()]

    def count(owner: Any, name: str, sign: int) -> None:
        function = getattr(owner, name)

        def timed(*args: Any, **options: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **options)
            finally:
                spent["own"] += sign * (time.process_time() - started)

        setattr(owner, name, timed)

    count(trainer_recording.TrainerRecording, "_add", 1)
    count(trainer_recording.TrainerRecording, "on_pre_optimizer_step", 1)
    count(recorder.TrajectoryRecorder, "_save", -1)
    count(forward_seeds.ForwardSeeds, "_before_forward", 1)
    count(indexed_data, "attach_index", 1)
    count(indexed_data, "split_index", 1)

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            own.append(spent["own"])
            complete.append(time.process_time() - marks[0])
            spent["own"], marks[0] = 0.0, time.process_time()

    trainer.add_callback(Clock())
    trainer.train()
    return own, complete
