"""Common rationales on a vision transformer of timm's, whose patch tokens are the feature map.

`--model NAME` takes others (timm.list_models()); `fastcr train --model.backbone timm:NAME` does it all.
pip install "fastcr[timm]"; python examples/with_timm.py --steps 20
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from fastcr import RationaleHead, info_nce
from fastcr.data.synthetic import CLASSES, draw_bird
from fastcr.encoders.backbone import build_backbone

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()
torch.manual_seed(0)

augment = v2.Compose(
    [
        v2.ToImage(),
        v2.RandomResizedCrop(96, scale=(0.2, 1)),
        v2.RandomHorizontalFlip(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
)
rng = np.random.default_rng(0)
birds = [draw_bird(kind, rng) for kind in CLASSES * 4]  # your data set

encoder, channels = build_backbone(f"timm:{options.model}", image_size=96)  # [B,3,96,96] to [B,C,6,6]
projection = nn.Sequential(nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 128))
head = RationaleHead(channels, detectors=32)
model = nn.ModuleList([encoder, projection, head]).to(options.device)
optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
queue = F.normalize(torch.randn(64, 128, device=options.device), dim=1)  # negatives: the keys of past steps

for step in range(options.steps):
    batch = [birds[i] for i in torch.randint(len(birds), (options.batch_size,)).tolist()]
    first, second = (torch.stack([augment(bird) for bird in batch]).to(options.device) for _ in range(2))
    features = encoder(first)  # [B,C,H,W]
    pooled = features.mean((2, 3))  # [B,C]
    projected = projection(pooled)  # [B,D]
    with torch.no_grad():
        key = F.normalize(projection(encoder(second).mean((2, 3))), dim=1)
    contrast = info_nce(F.normalize(projected, dim=1), key, queue, temperature=0.2).mean()
    fit = head.loss(features, pooled, projected, key)  # the one new line
    optimizer.zero_grad()
    (contrast + fit).backward()
    optimizer.step()
    queue = torch.cat([key, queue])[: len(queue)]
    print(f"step {step} contrast {contrast.item():.4f} fit {fit.item():.4f}")

with torch.no_grad():
    features = encoder.eval()(first)
    embedding, attention = head.pool(features)
print(f"embedding {list(embedding.shape)} attention {list(attention.shape)}")
row, column = divmod(int(attention[0].argmax()), features.shape[3])
print(f"in the first image the attention peaks in row {row}, column {column} of {list(features.shape[2:])}")
