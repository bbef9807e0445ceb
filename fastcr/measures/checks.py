"""What the measures take: embeddings and labels in any usual form, checked in one pass over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcr.errors import one_line

SLACK = 1e-3  # of the length of a unit vector, as many small errors of fp32 make it


def usable(embeddings: Any, name: str = "embeddings", width: int | None = None) -> Tensor:
    """Embeddings `[N,C]`, a tensor, an array or lists of any real numbers, as fp32 of unit length.

    Rows of zeros stay: they are like nothing. `ValueError` for what is not of this form or not finite (it names the
    first such row), or where C is not `width`.
    """
    found = _tensor(embeddings, name)
    if found.ndim != 2 or found.is_complex() or width not in (None, found.shape[-1]):
        raise ValueError(f"{name} must be [N,{width or 'C'}], a row for each image, got {list(found.shape)}")
    found = found.float()
    lengths = found.norm(dim=1)
    if not lengths.isfinite().all():
        raise ValueError(f"{name}, row {_first(~lengths.isfinite())}, is not finite: it holds NaN or infinity")
    if ((lengths - 1).abs() > SLACK).any():
        found = found / torch.where(lengths > 0, lengths, 1.0)[:, None]
    return found


def usable_labels(labels: Any, embeddings: Tensor, classes: int | None = None) -> Tensor:
    """Labels `[N]` or `[N,1]`, one for each of the embeddings `[N,...]` and on their device, as int64.

    `ValueError` for another number of them, or for the first that is no integer or not from 0 to `classes` - 1.
    """
    found = _tensor(labels, "labels")
    found = found[:, 0] if found.ndim == 2 and found.shape[1] == 1 else found
    if found.shape != embeddings.shape[:1]:
        raise ValueError(f"{len(embeddings)} embeddings need as many labels in one row, got {list(found.shape)}")
    whole = found.long()
    bad = (whole != found) if classes is None else (whole != found) | (whole < 0) | (whole >= classes)
    if bad.any():
        of = "" if classes is None else f" from 0 to {classes - 1}"
        raise ValueError(f"label {_first(bad)} is {found[bad][0].item()}, not a whole number{of}")
    return whole.to(embeddings.device)


def _tensor(values: Any, name: str) -> Tensor:
    try:
        if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
            values = torch.stack(list(values))
        return torch.as_tensor(values).detach()
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name} must be numbers, in rows of one length: {one_line(error)}") from None


def _first(mask: Tensor) -> int:
    return int(mask.nonzero()[0, 0])
