"""What test_distributed.py has two processes do, and one alone: `python -m ... DATA CALM_WEIGHTS OUT`.

The first process writes what came of it to OUT.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, RunConfig
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.measures.embeddings import embed
from fastcr.method.build import Training, build
from fastcr.runs.context import Context
from fastcr.runs.distributed import processes_of_torchrun


def settings(root: Path, weights: Path, **more: Any) -> Config:
    return Config(
        run=RunConfig(device="cpu", precision="fp32"),
        data=DataConfig(root=root, loader="torch", image_size=32, workers=0, cache="off"),
        model=ModelConfig("resnet18", "layer3", str(weights), batchnorm=more.pop("batchnorm", "frozen")),
        optim=OptimConfig(epochs=8, batch_size=16, lr=more.pop("lr", 0.001)),
        moco=MocoConfig(queue_size=more.pop("queue_size", 100), embedding_dim=16),
        rationale=RationaleConfig(detectors=4, stop_gradient=False, **more),
    )


def losses_of(config: Config, context: Context, steps: int) -> tuple[list[dict[str, float]], Training]:
    training = build(config, context)
    views, _ = make_views(config, read_splits(config.data.root).train, context)
    batches, found = views.batches(0), []
    for _ in range(steps):
        loss, losses = training.step(next(batches))
        parts = {"loss": loss.item(), "contrast": losses.contrast.item(), "fit": losses.fit.item()}
        found.append(context.processes.mean(parts))
    return found, training


def main() -> None:
    root, weights, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with processes_of_torchrun("test") as processes:
        context = Context(processes=processes)
        config = settings(root, weights)
        results["losses"], training = losses_of(config, context, 20)
        if processes.ranks == 1:
            results["untrained"], _ = losses_of(settings(root, weights, lr=1e-9), context, 8)
        moco = training.moco
        results["queues"] = processes.gather(moco.queue.tolist())
        results["position"] = moco.queue_position.item()
        parameters = torch.cat([parameter.flatten() for parameter in training.model.parameters()])
        results["weights"] = [weights.double().sum().item() for weights in processes.gather(parameters.detach())]

        of_the_batch = settings(root, weights, queue_size=0, cam_weights="common")
        results["of the batch"], _ = losses_of(of_the_batch, context, 3)
        results["local"], _ = losses_of(settings(root, weights, batchnorm="local"), context, 2)

        test = read_splits(root).test
        assert test
        found = embed(training.encoder, test, context, title="")
        results["kept"], results["unreadable"] = found.kept.tolist(), found.unreadable
        results["embeddings"] = [each.double().sum(1).tolist() for each in found[:3]]
        results["sizes"] = found.sizes.tolist()
        if processes.first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
