"""Common rationales beside lightly's MoCo: its projection heads, momentum update, loss and memory bank.

pip install "fastcr[peers]"; python examples/with_lightly.py --steps 20
"""

import argparse
from copy import deepcopy

import numpy as np
import torch
import torch.nn.functional as F
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import deactivate_requires_grad, update_momentum
from lightly.transforms import MoCoV2Transform
from torch import nn
from torchvision.models import resnet18

from fastcr import RationaleHead
from fastcr.data.synthetic import CLASSES, draw_bird

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=16)
parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
options = parser.parse_args()
torch.manual_seed(0)

rng = np.random.default_rng(0)
birds = [draw_bird(kind, rng) for kind in CLASSES * 4]  # your data set
transform = MoCoV2Transform(input_size=96)

encoder = nn.Sequential(*list(resnet18().children())[:-3])  # up to layer3: [B,3,96,96] to [B,256,6,6]
projection = MoCoProjectionHead(256, 256, 128)
head = RationaleHead(256, detectors=32)
key_encoder, key_projection = deepcopy(encoder), deepcopy(projection)
deactivate_requires_grad(key_encoder)
deactivate_requires_grad(key_projection)
criterion = NTXentLoss(temperature=0.2, memory_bank_size=(64, 128))
model = nn.ModuleList([encoder, projection, head, key_encoder, key_projection, criterion]).to(options.device)
optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=5e-4)

for step in range(options.steps):
    update_momentum(encoder, key_encoder, m=0.99)
    update_momentum(projection, key_projection, m=0.99)
    batch = [transform(birds[i]) for i in torch.randint(len(birds), (options.batch_size,)).tolist()]
    first, second = (torch.stack(view).to(options.device) for view in zip(*batch, strict=True))
    features = encoder(first)  # [B,C,H,W]
    pooled = features.mean((2, 3))  # [B,C]
    projected = projection(pooled)  # [B,D]
    with torch.no_grad():
        key = F.normalize(key_projection(key_encoder(second).mean((2, 3))), dim=1)
    contrast = criterion(projected, key)
    fit = head.loss(features, pooled, projected, key)  # the one new line
    optimizer.zero_grad()
    (contrast + fit).backward()
    optimizer.step()
    print(f"step {step} contrast {contrast.item():.4f} fit {fit.item():.4f}")

with torch.no_grad():
    embedding, attention = head.pool(encoder.eval()(first))
print(f"embedding {list(embedding.shape)} attention {list(attention.shape)}")
