"""Common rationales in a training loop of plain torch: InfoNCE on two views, a torchvision ResNet, drawn birds.

python examples/plain_torch.py --steps 20
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms import v2

from fastcr.data.synthetic import CLASSES, draw_bird
from fastcr.kernels.info_nce import info_nce
from fastcr.method.rationale import RationaleHead

augment = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomResizedCrop(96, scale=(0.2, 1)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.4, 0.4, 0.1),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)


def main() -> None:
    """Train for `--steps` steps, print both losses, then embed a batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    birds = [draw_bird(kind, rng) for kind in CLASSES * 4]  # your data set

    def views(batch: list[int]) -> Tensor:
        return torch.stack([augment(birds[i]) for i in batch]).to(options.device)

    # up to layer3: pictures this small leave a map of 6x6 there
    encoder = nn.Sequential(*list(resnet18().children())[:-3]).to(options.device)
    projection = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128)).to(options.device)
    head = RationaleHead(256, detectors=32).to(options.device)
    queue = F.normalize(torch.randn(64, 128, device=options.device), dim=1)  # negatives: the keys of past steps
    trained = [*encoder.parameters(), *projection.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=5e-4)

    for step in range(options.steps):
        batch = torch.randint(len(birds), (options.batch_size,)).tolist()
        features = encoder(views(batch))  # [B,C,H,W]
        pooled = features.mean((2, 3))  # [B,C]
        projected = projection(pooled)
        query = F.normalize(projected, dim=1)
        with torch.no_grad():
            key = F.normalize(projection(encoder(views(batch)).mean((2, 3))), dim=1)
        contrast = info_nce(query, key, queue, temperature=0.2)  # one loss an image
        fit = head.loss(features, pooled, -(projected * key).sum(1))  # the one new line
        optimizer.zero_grad()
        (contrast.mean() + fit).backward()
        optimizer.step()
        queue = torch.cat([key, queue])[: len(queue)]
        print(f"step {step} contrast {contrast.mean().item():.4f} fit {fit.item():.4f}")

    with torch.no_grad():
        embedding, attention = head.pool(encoder.eval()(views(list(range(16)))))
    print(f"embedding {list(embedding.shape)} attention {list(attention.shape)}")


if __name__ == "__main__":
    main()
