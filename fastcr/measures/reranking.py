"""What needs no training and still raises retrieval: whitening, query expansion and k-reciprocal re-ranking.

- Whitening scales the principal axes of embeddings so that strong ones count less; half-whitened, by the fourth root of
  their variance.
- alpha-query expansion (Radenovic et al. 2018, arXiv 1711.02512) puts in place of an embedding the sum of its nearest,
  weighted with a power of their cosine.
- k-reciprocal re-ranking (Zhong et al. 2017, arXiv 1701.08398) holds two images for similar that have the same images
  among their nearest, and are among the nearest of these.

Embeddings `[N,C]` may have any float dtype; they are compared as if of unit length, and `ValueError` names a row that
is not finite. All of them are searched, and each is a query; nothing of size `[N,N]`
is kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcr.measures.checks import usable

ROWS = 64  # images that are looked at together: their neighbours' neighbours take some megabytes
Similarity = Callable[[Tensor], Tensor]  # indices of images [Q] to their similarities [Q,N], which the call may change


def cosine(embeddings: Tensor) -> Similarity:
    """Similarity by the cosine."""
    return lambda images: embeddings[images] @ embeddings.T


def nearest(embeddings: Tensor, count: int) -> Tensor:
    """Indices `[N,count]` of the most similar of all embeddings, the most similar first: as a rule the image itself."""
    count = min(count, len(embeddings))
    return torch.cat([(part @ embeddings.T).topk(count).indices for part in embeddings.split(ROWS)])


def expand(embeddings: Tensor, queries: Tensor | None = None, *, count: int = 10, alpha: float = 3.0) -> Tensor:
    """Unit `queries` `[Q,C]`, each the sum of itself and its `count` nearest, weighted with cosine ** `alpha`.

    The nearest are of the embeddings `[N,C]`. Without `queries` these themselves are expanded.
    """
    embeddings, found = usable(embeddings), list[Tensor]()
    queries = None if queries is None else usable(queries, "queries", embeddings.shape[1])
    for part in (embeddings if queries is None else queries).split(ROWS):
        # an embedding is its own nearest
        values, places = (part @ embeddings.T).topk(min(count + (queries is None), len(embeddings)))
        near = torch.einsum("qk,qkc->qc", values.clamp(min=0) ** alpha, embeddings[places])
        found.append(F.normalize(near if queries is None else part + near, dim=1))
    return torch.cat(found) if found else embeddings


def whiten(embeddings: Tensor, known: Tensor, dims: int = 256, power: float = 0.5) -> Tensor:
    """Unit embeddings `[N,C]` on the first `dims` principal axes of `known` `[M,C]`, M - 1 at most, at unit length.

    Each axis is divided by its standard deviation to the `power`: 0 is PCA alone, 1 is whitening.
    """
    embeddings = usable(embeddings)
    known = usable(known, "known embeddings", embeddings.shape[1])
    mean = known.mean(0)
    return F.normalize((embeddings - mean) @ principal(known - mean, dims, power), dim=1)


def principal(moved: Tensor, dims: int = 256, power: float = 0.5) -> Tensor:
    """The axes `[C,dims]` of `whiten`, each divided as it says, of embeddings `[M,C]` less their mean."""
    dims = max(min(dims, len(moved) - 1), 1)  # the others have no variance to divide by
    covariance = sum(part.double().T @ part.double() for part in moved.split(4096)) / len(moved)
    values, axes = torch.linalg.eigh(covariance)
    values, axes = values.flip(0)[:dims].clamp(min=1e-12), axes.flip(1)[:, :dims]
    return (axes * values ** (-power / 2)).to(moved.dtype)


def reciprocal(embeddings: Tensor, k1: int = 20, k2: int = 6, weight: float = 0.3) -> Similarity:
    """Similarity by k-reciprocal neighbours; `k1`, `k2` and the `weight` of the cosine are the paper's.

    It is minus the distance of the paper's equation 12: squared Euclidean distances, divided by a row's largest, and
    Jaccard distances of the neighbourhoods, which the `k2` nearest share.
    """
    embeddings = usable(embeddings)
    count = len(embeddings)
    lists = nearest(embeddings, k1 + 1)
    half = _mutual(lists[:, : round(k1 / 2) + 1])
    largest, parts = torch.empty(count, device=embeddings.device), list[Tensor]()
    for first in range(0, count, ROWS):
        rows = torch.arange(first, min(first + ROWS, count), device=embeddings.device)
        distance = 2 - 2 * embeddings[rows] @ embeddings.T
        largest[rows] = distance.amax(1).clamp(min=1e-12)
        parts.append(_neighbourhoods(rows, distance / largest[rows, None], lists, half))
    row, column, value = _spread(torch.cat(parts, dim=1), lists[:, : max(k2, 1)], count)
    ends = torch.arange(count + 1, device=embeddings.device)
    by_column = torch.argsort(column, stable=True)
    starts, column_starts = torch.searchsorted(row, ends), torch.searchsorted(column[by_column].contiguous(), ends)

    def similarity(images: Tensor) -> Tensor:
        shared = torch.zeros(len(images), count, device=embeddings.device)
        for part in torch.arange(len(images), device=embeddings.device).split(ROWS):
            # every weight of a query, and every image that has a weight in the same column
            mine, at = _ranges(starts[images[part]], starts[images[part] + 1])
            pair, place = _ranges(column_starts[column[at]], column_starts[column[at] + 1])
            other = by_column[place]
            least = torch.minimum(value[at][pair], value[other])
            shared.view(-1).index_add_(0, part[mine[pair]] * count + row[other], least)
        jaccard = 1 - shared / (2 - shared)
        distance = (2 - 2 * embeddings[images] @ embeddings.T) / largest[images, None]
        return -((1 - weight) * jaccard + weight * distance)

    return similarity


def _mutual(lists: Tensor) -> Tensor:
    """Lists of nearest `[N,k]`, with -1 for those that do not have the image in their own list."""
    images = torch.arange(len(lists), device=lists.device)
    parts = [(lists[lists[rows]] == rows[:, None, None]).any(2) for rows in images.split(ROWS)]
    return torch.where(torch.cat(parts), lists, -1)


def _neighbourhoods(rows: Tensor, distance: Tensor, lists: Tensor, half: Tensor) -> Tensor:
    """Weights of the images in the expanded neighbourhoods of some `rows`: row, column and weight `[3,n]`, fp64.

    `half` holds mutual neighbours of half as long lists: those of a neighbour are taken in where more than two thirds
    of them are neighbours already.
    """
    near = torch.where((lists[lists[rows]] == rows[:, None, None]).any(2), lists[rows], -1)  # [R,k]
    further = half[near.clamp(min=0)]  # [R,k,h]
    known = (further[..., None] == near[:, None, None, :]).any(3) & (further >= 0)
    taken = (near >= 0) & (known.sum(2) > 2 / 3 * (further >= 0).sum(2))
    every = torch.cat([near, torch.where(taken[..., None], further, -1).flatten(1)], dim=1).sort(1).values
    first = every[:, 1:] != every[:, :-1]
    once = torch.cat([torch.ones_like(first[:, :1]), first], dim=1) & (every >= 0)
    weights = torch.where(once, torch.exp(-distance.gather(1, every.clamp(min=0))), 0.0)
    weights = weights / weights.sum(1, keepdim=True).clamp(min=1e-12)
    place = once.nonzero()
    return torch.stack([rows[place[:, 0]].double(), every[once].double(), weights[once].double()])


def _spread(own: Tensor, lists: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Each image's neighbourhood, averaged with those of its nearest `[N,k2]`: rows, columns and weights, by rows."""
    row, column = own[:2].long()
    starts = torch.searchsorted(row, torch.arange(count + 1, device=row.device))
    near = lists.flatten()
    place, at = _ranges(starts[near], starts[near + 1])
    key, which = torch.unique(place // lists.shape[1] * count + column[at], return_inverse=True)
    weights = torch.zeros(len(key), device=key.device).index_add_(0, which, own[2, at].float() / lists.shape[1])
    return key // count, key % count, weights


def _ranges(starts: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The members of ranges from a start to its end, one range after another, and the number of each one's range."""
    sizes = ends - starts
    number = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    before = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    return number, torch.arange(len(number), device=sizes.device) - before + starts[number]
