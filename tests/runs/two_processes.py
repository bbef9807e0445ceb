"""What test_distributed.py has two processes do, and one alone: `python two_processes.py DATA CALM_WEIGHTS OUT`.

The first process writes what came of it to OUT.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastcr.config import Config, DataConfig, MocoConfig, ModelConfig, OptimConfig, RationaleConfig, RunConfig
from fastcr.data.layouts import read_splits
from fastcr.data.loaders import make_views
from fastcr.measures.embeddings import embed
from fastcr.method.build import Training, build
from fastcr.runs.distributed import Processes, processes_of_torchrun

CPU = torch.device("cpu")
QUIET = Console(quiet=True)


def settings(root: Path, weights: Path, **more: Any) -> Config:
    return Config(
        run=RunConfig(device="cpu", precision="fp32"),
        data=DataConfig(root=root, loader="torch", image_size=32, workers=0, cache="off"),
        model=replace(ModelConfig("resnet18", "layer3", str(weights)), batchnorm=more.pop("batchnorm", "frozen")),
        optim=OptimConfig(epochs=8, batch_size=16, lr=more.pop("lr", 0.001), accumulate=more.pop("accumulate", 1)),
        moco=MocoConfig(queue_size=more.pop("queue_size", 100), embedding_dim=16),
        rationale=RationaleConfig(detectors=4, stop_gradient=False, **more),
    )


def losses_of(
    config: Config, processes: Processes, steps: int, held: int = 0
) -> tuple[list[dict[str, float]], Training]:
    training = build(config, CPU, QUIET, processes=processes)
    views, _ = make_views(config, read_splits(config.data.root).train, CPU, torch.float32, QUIET, processes)
    batches, found = views.batches(0), []
    for step in range(steps):
        if step in (0, held):
            training.hold(step < held)
        loss, losses = training.step(next(batches))
        parts = {"loss": loss.item(), "contrast": losses.contrast.item(), "fit": losses.fit.item()}
        found.append(processes.mean(parts))
    return found, training


def main() -> None:
    root, weights, out = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    with processes_of_torchrun("test") as processes:
        config = settings(root, weights)
        results["losses"], training = losses_of(config, processes, 20)
        results["untrained"], _ = losses_of(settings(root, weights, lr=1e-9), processes, 20)
        moco = training.moco
        results["queues"] = processes.gather(moco.queue.tolist())
        results["position"] = moco.queue_position.item()
        parameters = torch.cat([parameter.flatten() for parameter in training.model.parameters()])
        results["weights"] = [weights.double().sum().item() for weights in processes.gather(parameters.detach())]

        results["in parts"], _ = losses_of(settings(root, weights, accumulate=2), processes, 5)
        for parts in (1, 2):
            how = settings(root, weights, accumulate=parts, lr=0.01)
            results[f"held, {parts}"], released = losses_of(how, processes, 6, held=3)
            weight = released.moco.backbone.conv1.weight.detach()
            results[f"trained, {parts}"] = [each.double().norm().item() for each in processes.gather(weight)]
        results["of the batch"], _ = losses_of(
            settings(root, weights, queue_size=0, cam_weights="common"), processes, 5
        )
        results["local"], local = losses_of(settings(root, weights, batchnorm="local"), processes, 3)
        if processes.ranks > 1:
            torch.manual_seed(3)
            images = torch.randn(5, 3, 32, 32).to(memory_format=torch.channels_last) + processes.rank
            autocast = torch.autocast("cpu", enabled=False)
            assert local.moco.shuffle
            assert not moco.shuffle
            plain = moco.key(images, autocast)
            moco.shuffle = True
            results["shuffle"] = (moco.key(images, autocast) - plain).abs().max().item()
            results["spread"] = (plain - plain[:1]).abs().amax(1)[1:].min().item()
            moved = processes.shuffle(torch.full_like(images, float(processes.rank)))
            results["company"] = processes.gather(moved[:, 0, 0, 0].tolist())
            half = processes.shuffle(images.bfloat16())
            results["bf16"] = processes.most(*[int(half.dtype == torch.bfloat16 and half.shape == images.shape)])

        test = read_splits(root).test
        assert test
        how = {"device": CPU, "workers": 0, "console": QUIET, "title": "", "processes": processes}
        found = embed(training.encoder, test, **how)
        results["kept"], results["unreadable"] = found.kept.tolist(), found.unreadable
        results["embeddings"] = [each.double().sum(1).tolist() for each in found[:3]]
        results["sizes"] = found.sizes.tolist()
        if processes.first:
            out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
