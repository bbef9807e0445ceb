"""The three ops, forward and backward: the public function, its eager reference, and that under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.kernels.info_nce import info_nce, info_nce_reference
from fastcr.kernels.rationale_fit import rationale_fit, rationale_fit_reference
from fastcr.kernels.rationale_pool import rationale_pool, rationale_pool_reference

WAYS = ("op", "eager", "compiled")


def _way(name: str, op: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    return {"op": op, "eager": reference, "compiled": torch.compile(reference)}[name]


@pytest.fixture
def maps(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of ResNet-50 at 224 px (on the CPU: ResNet-18's layer3, fewer), gradient, detectors, bias."""
    batch, channels = (256, 2048) if device.type == "cuda" else (16, 256)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    features = torch.randn(batch, channels, 7, 7, device=device, dtype=dtype).relu()
    features = features.to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(batch, channels, device=device)
    detectors = (torch.randn(32, channels, device=device) / channels**0.5).requires_grad_()
    return features, gradient, detectors, torch.zeros(32, device=device, requires_grad=True)


@pytest.mark.parametrize("way", WAYS)
def test_rationale_fit(benchmark: Any, finished: Any, maps: tuple[Tensor, ...], way: str) -> None:
    fit = _way(way, rationale_fit, rationale_fit_reference)
    features, gradient, detectors, bias = maps

    def run() -> None:
        divergence = fit(features, gradient, detectors, bias, pool_weight=1 / len(features)).divergence
        torch.autograd.grad(divergence.sum(), (features, detectors, bias))

    run()
    benchmark(finished(run))


@pytest.mark.parametrize("way", WAYS)
def test_rationale_pool(benchmark: Any, finished: Any, maps: tuple[Tensor, ...], way: str) -> None:
    pool = _way(way, rationale_pool, rationale_pool_reference)
    features, _, detectors, bias = maps

    @torch.no_grad()
    def run() -> None:
        pool(features, detectors, bias)

    run()
    benchmark(finished(run))


@pytest.mark.parametrize("way", WAYS)
def test_info_nce(benchmark: Any, finished: Any, device: torch.device, way: str) -> None:
    loss = _way(way, info_nce, info_nce_reference)
    batch, keys = (256, 65536) if device.type == "cuda" else (64, 4096)
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 256, device=device), dim=1) for n in (batch, batch, keys))
    query.requires_grad_()

    def run() -> None:
        torch.autograd.grad(loss(query, key, queue).sum(), query)

    run()
    benchmark(finished(run))
