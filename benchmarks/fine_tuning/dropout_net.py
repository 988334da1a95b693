"""A classifier of pictures of 28 x 28, with dropout."""

import lightning
import torch
from torch import nn
from torch.nn import functional as F


class DropoutNet(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 32), nn.GELU(), nn.Dropout(0.2), nn.Linear(32, 10)
        )

    def training_step(self, batch, index):
        pictures, labels = batch
        return F.cross_entropy(self.layers(pictures), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
