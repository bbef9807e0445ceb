"""Linear classification of embeddings, with all labels or a few of them.

The recipe is that of the paper (and of MoCo): SGD, learning rate 30, momentum 0.9, no weight decay, 100 epochs, a tenth
of the rate after 60 and again after 80, batches of 256.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEARNING_RATE, EPOCHS, MILESTONES, BATCH = 30.0, 100, (60, 80), 256


def fit_linear(embeddings: Tensor, labels: Tensor, classes: int, *, epochs: int = EPOCHS, seed: int = 0) -> nn.Linear:
    """A classifier of unit embeddings `[N,C]` with `labels` `[N]`, trained on their device; it starts from 0.

    With other than 100 epochs the milestones keep their share.
    """
    classifier = nn.Linear(embeddings.shape[1], classes, device=embeddings.device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), lr=LEARNING_RATE, momentum=0.9)
    milestones = [round(epoch * epochs / EPOCHS) for epoch in MILESTONES]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    labels = labels.to(embeddings.device)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=random).to(labels.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(classifier(embeddings[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return classifier


def few_labels(labels: Tensor, share: float, seed: int = 0) -> Tensor:
    """Indices of a random `share` of each class's images, one at least; more labels include those of fewer."""
    random = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=random)
        chosen.append(members[order[: max(round(share * len(members)), 1)]])
    return torch.cat(chosen).sort().values


def few_label_scores(
    train: Tensor,
    labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    shares: Sequence[float],
    *,
    epochs: int = EPOCHS,
) -> list[float]:
    """For each share of the training labels: top-1 on the test embeddings, percent.

    Shares that come to the same images (1 % and 10 % of ten pictures a class) share one classifier.
    """
    measured: dict[tuple[int, ...], float] = {}
    chosen = [few_labels(labels, share) for share in shares]
    for rows in chosen:
        if tuple(rows.tolist()) not in measured:
            classifier = fit_linear(train[rows.to(train.device)], labels[rows], classes, epochs=epochs)
            measured[tuple(rows.tolist())] = accuracy(classifier, test, test_labels)
    return [measured[tuple(rows.tolist())] for rows in chosen]


@torch.no_grad()
def accuracy(classifier: nn.Module, embeddings: Tensor, labels: Tensor, within: int = 1) -> float:
    """Share of embeddings `[N,C]` whose label is among the `within` likeliest classes, percent."""
    scores = classifier(embeddings).cpu()
    found = scores.topk(min(within, scores.shape[1]), dim=1).indices == labels.cpu()[:, None]
    return 100 * found.any(1).double().mean().item()
