"""Records the training of a transformers Trainer. Needs the extra `hf`."""

import copy
import math
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from influence_cli.errors import TrajectoryError
from influence_cli.integrations.example_weights import ExampleWeights, LossFunction, MicroBatch
from influence_cli.integrations.hf_task import inner_model
from influence_cli.integrations.indexed_data import (
    KEY,
    IndexedCollator,
    IndexedDataset,
    check_map_style,
)
from influence_cli.run.parameters import unwrap_model
from influence_cli.run.recorder import TrajectoryRecorder

CLIP_EPSILON = 1e-6  # that torch's clip_grad_norm_ adds to a norm


class TrainerRecording(TrainerCallback):
    """A callback that records each optimizer step of its trainer (huggingface.record).

    It wraps the trainer's dataset, collator and `training_step`, and the accelerator's `backward`
    and `clip_grad_norm_`.
    """

    def __init__(
        self,
        trainer: Any,  # a transformers.Trainer
        folder: Path,
        checkpoint_every: int | None,
        seed: int,
        loss: LossFunction | None,
        normalise: str | None,
    ) -> None:
        refuse_unsupported(trainer)
        self.trainer, self.folder = trainer, folder
        self.checkpoint_every, self.seed = checkpoint_every, seed
        self.model = unwrap_model(trainer.model)
        self.weights = ExampleWeights(inner_model(self.model), loss, normalise)
        self.recorder: TrajectoryRecorder | None = None
        self._forward: tuple[Any, Any] | None = None  # outputs and labels of the last forward pass
        self._loss = math.nan  # that the accelerator differentiated last
        self._clip = 1.0  # of the gradient of the next step
        self._wrap_data()
        self._wrap_step()

    # ------------------------------------------------------------ wrapping
    def _wrap_data(self) -> None:
        trainer = self.trainer
        check_map_style(trainer.train_dataset, "Trainer")
        trainer.train_dataset = IndexedDataset(trainer.train_dataset)
        trainer.data_collator = IndexedCollator(trainer.data_collator)
        trainer._set_signature_columns_if_needed()  # Trainer drops other columns
        trainer._signature_columns.append(KEY)

    def _wrap_step(self) -> None:
        trainer, accelerator = self.trainer, self.trainer.accelerator
        training_step, backward = trainer.training_step, accelerator.backward
        clip_grad_norm = accelerator.clip_grad_norm_

        def step(model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            indices = inputs.pop(KEY, None) if isinstance(inputs, MutableMapping) else None
            result = training_step(model, inputs, num_items_in_batch)
            self._add(indices, num_items_in_batch)
            return result

        def differentiate(loss: Any, **options: Any) -> None:
            self._loss = float(loss.detach()) / accelerator.gradient_accumulation_steps
            backward(loss, **options)

        def clip(parameters: Any, max_norm: float, *args: Any, **options: Any) -> Any:
            norm = clip_grad_norm(parameters, max_norm, *args, **options)
            if norm is not None and math.isfinite(max_norm):
                self._clip = min(1.0, max_norm / (float(norm) + CLIP_EPSILON))
            return norm

        trainer.training_step, accelerator.backward = step, differentiate
        accelerator.clip_grad_norm_ = clip

    def _catch_outputs(self, model: Any, args: Any, inputs: Any, outputs: Any) -> None:
        if model.training:
            self._forward = outputs, inputs.get("labels")

    # ------------------------------------------------------------ recording
    def _add(self, indices: Any, items: Any) -> None:  # Any: tensors
        if self.recorder is None:
            return
        if indices is None or self._forward is None:
            raise TrajectoryError(
                "a micro-batch of Trainer came without the indices of its examples"
                if indices is None
                else "a training step of Trainer ran without a forward pass of its model",
                "expected: batches of trainer.train_dataset, by its data_collator",
            )
        outputs, labels = self._forward
        self._forward = None
        batch = MicroBatch(
            outputs,
            labels,
            self._loss,
            None if items is None else float(items),
            self.trainer.current_gradient_accumulation_steps,
        )
        self.recorder.add(indices.cpu(), self.weights.measure(batch, len(indices)))

    def on_train_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any
    ) -> None:
        self.close()
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        self._handle = self.model.register_forward_hook(self._catch_outputs, with_kwargs=True)
        self.recorder = TrajectoryRecorder(
            self.folder,
            self.model,
            optimizer,
            self.checkpoint_every or steps_between_saves(args, state),
            start=state.global_step,
            save_optimizer=True,
            seed=self.seed,
        )
        self.recorder.__enter__()
        self._save_description()

    def _save_description(self) -> None:
        """Saves config.json and the tokenizer, which `influence init` reads, where none is."""
        inner = inner_model(self.model)
        if hasattr(inner, "config") and not (self.folder / "config.json").exists():
            config = copy.deepcopy(inner.config)
            config.architectures = [type(inner).__name__]  # as model.save_pretrained() does
            config.save_pretrained(self.folder)
        processor = self.trainer.processing_class
        names = ("tokenizer_config.json", "preprocessor_config.json")
        if processor is not None and not any((self.folder / name).exists() for name in names):
            processor.save_pretrained(self.folder)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.recorder is not None:
            self.recorder.step(clip=self._clip)
            self._clip = 1.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Trainer logs this when training ends, before it may load the best checkpoint."""
        if logs and "train_runtime" in logs:
            self.close(complete=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.close(complete=True)

    def close(self, complete: bool = False) -> None:
        """Stops recording. `complete`: saves the last checkpoint."""
        if self.recorder is not None:
            recorder, self.recorder = self.recorder, None
            self._handle.remove()
            recorder.__exit__(None if complete else InterruptedError)


def steps_between_saves(args: Any, state: Any) -> int:  # Any: transformers' own
    """As often as Trainer saves; at the end alone where it never does."""
    if args.save_strategy == SaveStrategy.STEPS:
        return max(1, int(state.save_steps))
    if args.save_strategy == SaveStrategy.EPOCH:
        return max(1, math.ceil(state.max_steps / max(1, state.num_train_epochs)))
    return max(1, state.max_steps)


def refuse_unsupported(trainer: Any) -> None:  # Any: a transformers.Trainer
    """Raises TrajectoryError for a training whose steps are no sum of examples' gradients here."""
    args, accelerator = trainer.args, trainer.accelerator
    problems = {
        f"{accelerator.num_processes} processes": accelerator.num_processes > 1,
        f"DataParallel over {args.n_gpu} GPUs": args.n_gpu > 1,
        "DeepSpeed": trainer.is_deepspeed_enabled,
        "FSDP": trainer.is_fsdp_enabled,
        "fp16, whose gradient scaler skips steps": args.fp16,
        "NEFTune's noise (neftune_noise_alpha)": args.neftune_noise_alpha is not None,
        "label smoothing": args.label_smoothing_factor > 0,
    }
    if unsupported := [name for name, is_used in problems.items() if is_used]:
        raise TrajectoryError(
            f"record(trainer) does not support: {', '.join(unsupported)}",
            "expected: one process, float32 or bfloat16",
            "TrajectoryRecorder records any loop (docs/trajectory-format.md)",
        )
