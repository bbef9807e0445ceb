"""Classification and localisation with embeddings and attention maps, against scikit-learn and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torchvision.transforms.v2 import functional as TF

from fastcr.config import LinearConfig
from fastcr.data.images import ImageList
from fastcr.errors import UsageError
from fastcr.measures.knn import accuracy, knn
from fastcr.measures.linear_probe import few_labels, fit_linear
from fastcr.measures.localisation import (
    gaussian_of_entropy,
    localisation,
    objects_in_crop,
    read_objects,
)
from fastcr.measures.results import Split, classifier_scores

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(count: int, *, classes: int = 5, spread: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(9))
    labels = torch.randint(classes, (count,), generator=random)
    return F.normalize(centres[labels] + spread * torch.randn(count, 16, generator=random), dim=1), labels


@pytest.mark.parametrize(("k", "temperature"), [(7, 0.1), (30, 0.02), (10_000, 1.0)])
def test_knn_agrees_with_scikit_learn(k: int, temperature: float) -> None:
    (train, labels), (queries, truth) = clusters(300, spread=2), clusters(200, spread=2, seed=1)

    def weights(distance: np.ndarray) -> np.ndarray:
        return np.exp((1 - distance) / temperature)

    other = KNeighborsClassifier(min(k, 300), metric="cosine", algorithm="brute", weights=weights)
    other.fit(train.double().numpy(), labels.numpy())
    expected = torch.from_numpy(other.predict_proba(queries.double().numpy()))
    scores = knn(train, labels, queries, 5, k=k, temperature=temperature)
    torch.testing.assert_close((scores / scores.sum(1, keepdim=True)).double(), expected, atol=1e-4, rtol=1e-3)
    assert accuracy(scores, truth) == pytest.approx(100 * other.score(queries.double().numpy(), truth.numpy()), abs=0.6)


def test_a_linear_probe_is_as_good_as_scikit_learns() -> None:
    (train, labels), (queries, truth) = clusters(2000, spread=1.2), clusters(1000, spread=1.2, seed=1)
    other = LogisticRegression(C=100.0, max_iter=2000).fit(train.numpy(), labels.numpy())
    classifier = fit_linear(train, labels, 5)
    scores = classifier(queries)
    assert accuracy(scores, truth) == pytest.approx(100 * other.score(queries.numpy(), truth), abs=1.0)
    assert accuracy(scores, truth) > 60
    assert accuracy(scores, truth, within=5) == 100
    assert accuracy(scores, truth.roll(1)) < 40


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=60), st.sampled_from([0.01, 0.1, 0.2, 0.5, 1.0]))
def test_few_labels_are_a_share_of_every_class(labels: list[int], share: float) -> None:
    given_labels = torch.tensor(labels)
    rows = few_labels(given_labels, share)
    assert len(rows.unique()) == len(rows)
    for label in set(labels):
        assert (given_labels[rows] == label).sum() == max(round(share * labels.count(label)), 1)
    assert set(rows.tolist()) <= set(few_labels(given_labels, 1.0).tolist()) == set(range(len(labels)))
    assert set(few_labels(given_labels, share / 2).tolist()) <= set(rows.tolist())


def picture_list(*files: str) -> ImageList:
    return ImageList(Path("/data/test"), files, None, ())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path,left,top,right,bottom\na/1.jpg,x,0,1,1\n", "could not convert"),
        ("path,left,top,right,bottom\nother.jpg,0,0,1,1\n", "for none of the images, e.g. not for 'a/1.jpg'"),
        ("path,left,top,right,bottom\na/1.jpg,0.5,0,0.4,1\n", r"left is not below right, .*, 0.4, 1.0\]"),
        ("path,left,top,right,bottom\na/1.jpg,0,0,1,1\na/2.jpg,0,0,40,40\n", "1 of 2 are in pixels"),
        ("path,left,top,right,bottom\na/1.jpg,0,0,1,1\na\\1.jpg,0,0,1,1\n", "it has 2 for 1 images"),
        ("path,x,y,w,h\na/1.jpg,0,0,1,1\n", "there is no 'left'"),
        (None, "No such file"),
    ],
)
def test_files_without_boxes_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    file = tmp_path / "boxes.csv"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"holds no boxes: .*{message}"):
        read_objects(file, picture_list("a/1.jpg", "a/2.jpg"))


def test_classifiers_are_scored_by_section_and_pooling() -> None:
    (train, labels), (queries, truth) = clusters(50), clusters(40, seed=1)
    known, asked = (Split({"mean": x, "rationale": -x}, y) for x, y in ((train, labels), (queries, truth)))
    found = classifier_scores(known, asked, 5, LinearConfig(few=(1, 10, 100), epochs=20))
    assert list(found) == ["knn", "linear", "few_label"]
    assert list(found["few_label"]["mean"]) == ["10", "100"]  # of ten a class, 1 % is the same picture as 10 %
    assert all({*part} == {"mean", "rationale"} for part in found.values())
    assert found["knn"]["mean"] == {"top1": accuracy(knn(train, labels, queries, 5), truth)}
    scores, few = fit_linear(train, labels, 5, epochs=20)(queries), few_labels(labels, 0.1)
    assert found["linear"]["mean"] == {"top1": accuracy(scores, truth), "top5": 100}
    assert found["few_label"]["mean"]["100"] == found["linear"]["mean"]["top1"]
    rare = fit_linear(train[few], labels[few], 5, epochs=20)(queries)
    assert found["few_label"]["mean"]["10"] == accuracy(rare, truth) < 100
    without = classifier_scores(known, asked, 5, LinearConfig(enabled=False))
    assert without == {"knn": found["knn"]}


@settings(max_examples=40, deadline=None)
@given(st.integers(40, 700), st.integers(40, 700), st.sampled_from([32, 112, 224]), st.data())
def test_boxes_follow_the_pixels_through_resize_and_crop(
    height: int, width: int, size: int, data: st.DataObject
) -> None:
    left, right = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=2)))
    top, bottom = sorted(data.draw(st.lists(st.floats(0, 1), min_size=2, max_size=2)))
    # a picture whose pixels say where they are
    x = torch.linspace(0.5 / width, 1 - 0.5 / width, width).expand(height, width)
    y = torch.linspace(0.5 / height, 1 - 0.5 / height, height)[:, None].expand(height, width)
    image = TF.resize(torch.stack([x, y]), [round(size * 8 / 7)], antialias=True)
    image = TF.center_crop(image, [size, size])
    box = objects_in_crop(torch.tensor([[left, top, right, bottom]]).double(), torch.tensor([[height, width]]), size)[0]
    pixel = (torch.arange(size) + 0.5) / size
    inside_x, inside_y = (image[0] >= left) & (image[0] <= right), (image[1] >= top) & (image[1] <= bottom)
    by_box = (pixel[None, :] >= box[0]) & (pixel[None, :] <= box[2])
    assert (inside_x != by_box).float().mean() <= 2.1 / size  # a pixel on either edge
    by_box = (pixel[:, None] >= box[1]) & (pixel[:, None] <= box[3])
    assert (inside_y != by_box).float().mean() <= 2.1 / size


def test_localisation_by_hand() -> None:
    attention = torch.zeros(3, 16)
    attention[0, 5] = 1  # row 1, column 1
    attention[1, 0], attention[1, 15] = 0.6, 0.4
    boxes = torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1], [math.nan] * 4])
    scores = localisation(attention, boxes.double())
    assert scores["attention"]["inside"] == pytest.approx(100 * (1 + 0.4) / 2)
    assert scores["attention"]["pointing"] == 50
    assert scores["uniform"]["inside"] == pytest.approx(100 * (1 / 16 + 4 / 16) / 2)
    # of the average of both maps a half lies at 5, 0.3 at 0, 0.2 at 15
    assert scores["average"]["inside"] == pytest.approx(100 * (0.5 + 0.2) / 2)
    assert scores["average"]["pointing"] == 50
    assert scores["uniform"]["pointing"] == pytest.approx(100 * (1 / 16 + 4 / 16) / 2)
    assert scores["gaussian"]["pointing"] == 100  # the corners of both boxes are the centre
    twice = localisation(2 * attention, boxes.double())
    assert twice["attention"] == scores["attention"]


@pytest.mark.parametrize("side", [4, 7, 14])
def test_gaussians_have_the_entropy_asked_for(side: int) -> None:
    lowest = math.log(4) if side % 2 == 0 else 0.0  # between four cells it cannot be narrower
    wanted = torch.linspace(lowest + 0.01, 2 * math.log(side) - 0.001, 12).double()
    maps = gaussian_of_entropy(wanted, side)
    torch.testing.assert_close(-torch.xlogy(maps, maps).sum(1), wanted, atol=1e-6, rtol=0)
    grid = maps.view(-1, side, side)
    torch.testing.assert_close(grid, grid.flip(1))
    torch.testing.assert_close(grid, grid.transpose(1, 2))
    assert (grid.flatten(1).amax(1) == grid[:, side // 2, side // 2]).all()


@pytest.mark.parametrize(
    ("text", "in_pixels"),
    [
        ("\ufeffpath,left,top,right,bottom\r\na/1.jpg,.1,.2,.3,.4\r\n", False),
        ('path, left, top, right, bottom\n"./a/1.jpg", .1, .2, .3, .4\n', False),
        ("right,bottom,path,left,top,score\n30,80,a\\1.jpg,10,40,9\n", True),
        ("path,left,top,right,bottom\ntest/a/1.jpg,.1,.2,.3,.4\nb\\e\u0301.jpg,0,0,1,1\n", False),
    ],
)
def test_boxes_are_read_as_spreadsheets_write_them(tmp_path: Path, text: str, in_pixels: bool) -> None:
    (tmp_path / "boxes.csv").write_text(text, encoding="utf-8", newline="")
    objects = read_objects(tmp_path / "boxes.csv", picture_list("a/1.jpg", "b/\u00e9.jpg"))
    assert objects[1].tolist() == [0, 0, 1, 1] if "e\u0301" in text else objects[1].isnan().all()
    assert (objects > 1).any() == in_pixels
    box = objects / torch.tensor([100, 200, 100, 200]) if in_pixels else objects
    torch.testing.assert_close(box[0], torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))


def test_boxes_in_pixels_of_other_sizes_are_refused() -> None:
    objects = torch.tensor([[10.0, 10, 400, 300]]).double()
    objects_in_crop(objects, torch.tensor([[310, 400]]), 112)
    with pytest.raises(UsageError, match=r"reach to 3.1 times the size of their images"):
        objects_in_crop(objects, torch.tensor([[128, 128]]), 112)
