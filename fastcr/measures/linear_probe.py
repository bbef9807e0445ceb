"""Linear classification of embeddings, with all labels or a few of them.

The recipe is that of the paper (and of MoCo): SGD, learning rate 30, momentum 0.9, no weight decay, 100 epochs, a tenth
of the rate after 60 and again after 80, batches of 256.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from fastcr.data.images import ImageList
from fastcr.data.views import normalise
from fastcr.runs.context import Context
from fastcr.runs.machine import leave_signals, workers_that_fit

LEARNING_RATE, EPOCHS, MILESTONES, BATCH = 30.0, 100, (60, 80), 256


def fit_linear(embeddings: Tensor, labels: Tensor, classes: int, *, epochs: int = EPOCHS, seed: int = 0) -> nn.Linear:
    """A classifier of unit embeddings `[N,C]` with `labels` `[N]`, trained on their device; it starts from 0."""
    classifier = new_classifier(embeddings.shape[1], classes).to(embeddings.device)
    optimizer, schedule = recipe(classifier, epochs)
    labels = labels.to(embeddings.device)
    random = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels), generator=random).to(labels.device).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(classifier(embeddings[rows]), labels[rows]).backward()
            optimizer.step()
        schedule.step()
    return classifier


def fit_augmented(
    encode: Callable[[Tensor], Mapping[str, Tensor]],
    images: ImageList,
    classes: int,
    context: Context,
    *,
    image_size: int,
    epochs: int = EPOCHS,
) -> dict[str, nn.Linear]:
    """As `fit_linear`, on random crops and mirror images: a classifier for each embedding that `encode` gives.

    `encode` maps normalised images `[B,3,S,S]` to unit embeddings `[B,C]` by name; `images` need labels.
    """
    crops = v2.Compose([v2.PILToTensor(), v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip()])
    workers = workers_that_fit(context.workers, 3 * BATCH * image_size**2)
    loader = DataLoader(
        _Labelled(images, crops), BATCH, shuffle=True, num_workers=workers, collate_fn=_readable,
        persistent_workers=workers > 0, generator=torch.Generator().manual_seed(0), worker_init_fn=leave_signals,
    )  # fmt: skip
    fitted: dict[str, tuple[nn.Linear, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]] = {}
    for _ in context.progress(range(epochs), "linear probe"):
        for pixels, labels in loader:
            with torch.no_grad():
                embeddings = encode(normalise(pixels.to(context.device), torch.float32))
            for name, vectors in embeddings.items():
                if name not in fitted:
                    classifier = new_classifier(vectors.shape[1], classes).to(context.device)
                    fitted[name] = (classifier, *recipe(classifier, epochs))
                classifier, optimizer, _schedule = fitted[name]
                optimizer.zero_grad()
                F.cross_entropy(classifier(vectors), labels.to(context.device)).backward()
                optimizer.step()
        for _, _, schedule in fitted.values():
            schedule.step()
    return {name: classifier for name, (classifier, _, _) in fitted.items()}


class _Labelled(Dataset[tuple[Tensor, int] | None]):
    """Index to an augmented image, uint8 `[S,S,3]`, and its label; None for an unreadable image."""

    def __init__(self, images: ImageList, transform: Callable[[Any], Tensor]) -> None:
        assert images.labels is not None
        self.images, self.labels, self.transform = images, images.labels, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            return self.transform(self.images.rgb(index)).permute(1, 2, 0), self.labels[index]
        except OSError:
            return None

    def __len__(self) -> int:
        return len(self.images)


def _readable(samples: list[tuple[Tensor, int] | None]) -> tuple[Tensor, Tensor]:
    found = [sample for sample in samples if sample is not None]
    return torch.stack([image for image, _ in found]), torch.tensor([label for _, label in found])


def new_classifier(channels: int, classes: int) -> nn.Linear:
    """A linear classifier that says nothing yet."""
    classifier = nn.Linear(channels, classes)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return classifier


def recipe(classifier: nn.Module, epochs: int) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Optimiser and schedule (stepped each epoch); with other than 100 epochs the milestones keep their share."""
    optimizer = torch.optim.SGD(classifier.parameters(), lr=LEARNING_RATE, momentum=0.9)
    milestones = [round(epoch * epochs / EPOCHS) for epoch in MILESTONES]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)


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
) -> Iterator[tuple[float, float]]:
    """For each share of the training labels: the share, and top-1 on the test embeddings, percent."""
    for share in shares:
        rows = few_labels(labels, share)
        classifier = fit_linear(train[rows.to(train.device)], labels[rows], classes, epochs=epochs)
        yield share, accuracy(classifier, test, test_labels)


@torch.no_grad()
def accuracy(classifier: nn.Module, embeddings: Tensor, labels: Tensor, within: int = 1) -> float:
    """Share of embeddings `[N,C]` whose label is among the `within` likeliest classes, percent."""
    scores = classifier(embeddings).cpu()
    found = scores.topk(min(within, scores.shape[1]), dim=1).indices == labels.cpu()[:, None]
    return 100 * found.any(1).double().mean().item()
