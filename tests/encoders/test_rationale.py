"""Pooling with an attention that stays a constant, as the head's input is pooled in training."""

import pytest
import torch
from torch import Tensor

from fastcr.encoders.rationale import RationaleHead


def plain(head: RationaleHead, features: Tensor) -> Tensor:
    """The equation in plain torch."""
    attention = head.pool(features).attention.detach()
    return torch.einsum("bs,bcs->bc", attention, features.flatten(2).to(attention.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0)])
def test_the_gradient_is_attention_times_what_comes_from_above(dtype: torch.dtype, tolerance: float) -> None:
    random = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, 5, 12, generator=random).to(dtype).permute(0, 3, 1, 2).requires_grad_()
    head = RationaleHead(12, detectors=3).to(torch.promote_types(dtype, torch.float32))
    pooled, expected = head.attended(features), plain(head, features)
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)
    upstream = torch.randn(pooled.shape, generator=random).to(pooled.dtype)
    for again in (False, True):
        (got,) = torch.autograd.grad(head.attended(features), features, upstream, create_graph=again)
        assert got.dtype == dtype
        assert got.is_contiguous(memory_format=torch.channels_last)
        (exact,) = torch.autograd.grad(expected, features, upstream, retain_graph=True)
        torch.testing.assert_close(got, exact, rtol=tolerance, atol=tolerance)


def test_it_reaches_no_detector_and_may_be_differentiated_again() -> None:
    features, head = torch.randn(3, 8, 2, 2, dtype=torch.float64).requires_grad_(), RationaleHead(8).double()
    upstream = torch.randn(3, 8, dtype=torch.float64).requires_grad_()
    for pool in (head.attended, lambda given: plain(head, given)):
        (gradient,) = torch.autograd.grad(pool(features), features, upstream, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), upstream)
        weights = head.pool(features).attention.square().sum(1, keepdim=True)
        torch.testing.assert_close(second, 2 * weights * upstream)
    head.attended(features).sum().backward()
    assert head.weight.grad is None
    with torch.no_grad():
        assert not head.attended(features).requires_grad
