"""Linear classification of embeddings, with all labels or a few of them.

The recipe is that of the paper (and of MoCo): SGD, learning rate 30, momentum 0.9, no weight decay, 100 epochs, a tenth
of the rate after 60 and again after 80, batches of 256.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastcr.measures.checks import usable, usable_labels

LEARNING_RATE, EPOCHS, MILESTONES, BATCH = 30.0, 100, (60, 80), 256


def fit_linear(embeddings: Any, labels: Any, classes: int, *, epochs: int = EPOCHS, seed: int = 0) -> nn.Linear:
    """A classifier of unit embeddings `[N,C]` with `labels` `[N]`, trained on their device from 0 on.

    With other than 100 epochs the milestones keep their share. `ValueError` for what `checks` refuses.
    """
    embeddings = usable(embeddings)
    labels = usable_labels(labels, embeddings, classes)
    classifier = nn.Linear(embeddings.shape[1], classes, device=embeddings.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=LEARNING_RATE, momentum=0.9)
    milestones = [round(epoch * epochs / EPOCHS) for epoch in MILESTONES]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=random).to(labels.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(classifier(embeddings[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return classifier.requires_grad_(False)


def few_labels(labels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Indices of a random `share` of each class's images, one at least; more labels include those of fewer."""
    random = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=random)
        chosen.append(members[order[: max(round(share * len(members)), 1)]])
    return torch.cat(chosen).sort().values
