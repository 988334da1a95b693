"""Trains the network of this run and writes its checkpoints and trajectory.jsonl: python train.py

Plain SGD on scikit-learn's digits; some training labels are wrong on purpose (flipped.json). Same bytes every time on one machine.
"""

import json
from pathlib import Path

import definition
import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
STEPS, BATCH, EVERY = 600, 64, 120


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, data = definition.model(), definition.train_data()
    images, labels, truth = data.tensors
    model.train()
    order = torch.Generator().manual_seed(1)
    queue: list[int] = []
    lines = [
        {
            "format": "influence-trajectory",
            "version": 1,
            "reduction": "mean",
            "optimizer": {"name": "sgd", "momentum": 0.0, "weight_decay": 0.0},
        }
    ]
    (HERE / "checkpoints").mkdir(exist_ok=True)
    for step in range(STEPS + 1):
        rate = 0.5 if step < STEPS // 2 else 0.25
        if step % EVERY == 0:
            save_file(
                model.state_dict(),
                HERE / f"checkpoints/step-{step:06d}.safetensors",
                metadata={"learning_rate": str(rate)},
            )
        if step == STEPS:
            break
        if len(queue) < BATCH:
            queue = torch.randperm(len(data), generator=order).tolist()
        batch, queue = queue[:BATCH], queue[BATCH:]
        lines.append({"step": step, "lr": rate, "examples": batch})
        mean = definition.loss(model, (images[batch], labels[batch], truth[batch])).mean()
        gradients = torch.autograd.grad(mean, list(model.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    (HERE / "trajectory.jsonl").write_text(
        "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
    )
    queries, answers, _ = definition.query_data().tensors
    right = (model(queries).argmax(1) == answers).float().mean()
    flipped = json.loads((HERE / "flipped.json").read_text())
    print(
        f"accuracy on the queries {right:.3f}; {len(flipped)} of {len(data)} training labels are flipped"
    )


if __name__ == "__main__":
    main()
