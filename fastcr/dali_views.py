"""Files to two views with NVIDIA DALI, on the CPU or the GPU: each image is decoded once, both views are cut from it.

The augmentation is drawn outside (`views.draw_parameters`) and handed to DALI with the bytes of the files, so the
pipeline has no state: order, seeds, resume and the views themselves are those of `torch_views`. Contrast and hue are
built from arithmetic, because DALI's own differ from torchvision's (contrast about a fixed grey, hue in YIQ).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from PIL import Image

from fastcr.folders import ImageList, read_rgb, read_rgb_or_next
from fastcr.views import (
    BadFiles,
    Batch,
    ViewParameters,
    draw_parameters,
    normalise,
    step_indices,
)

GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)
CHANNEL_SHIFT = np.array([0, 2 / 3, 1 / 3], dtype=np.float32)  # turns
END_OF_JPEG = b"\xff\xd9"
Encoded = tuple[np.ndarray, tuple[int, int], list[int]]
Node = Any  # a DALI DataNode: a batch of samples inside the graph


def _contrast(pixels: Node, factor: Node) -> Node:
    grey = fn.reductions.sum(fn.reductions.mean(pixels, axes=(0, 1)) * GREY)
    return fn.cast(pixels * factor + (1.0 - factor) * grey, dtype=types.UINT8)


def _hue(pixels: Node, turns: Node) -> Node:
    """Shift the HSV hue by `turns`, as torchvision does.

    A channel of a fully saturated colour is a trapezium over the hue, `clamp(|6t - 3| - 1, 0, 1)`, where `t` in [0, 1)
    is the hue for red and the hue shifted by a third of a turn for green and for blue.
    """
    x = fn.cast(pixels, dtype=types.FLOAT)
    high = fn.reductions.max(x, axes=2, keep_dims=True)
    low = fn.reductions.min(x, axes=2, keep_dims=True)
    chroma = high - low
    r, g, b = x[:, :, 0:1], x[:, :, 1:2], x[:, :, 2:3]
    red = r == high
    green = (red == False) & (g == high)  # noqa: E712 (batches of samples have no `not`)
    blue = (red == False) & (green == False)  # noqa: E712
    within = red * (g - b) + green * (b - r) + blue * (r - g)  # of the sixth around the largest channel
    hue = within / (6.0 * math.max(chroma, 1.0)) + (turns + green * (1 / 3) + blue * (2 / 3))
    t = hue + CHANNEL_SHIFT
    t = t - math.floor(t)
    return fn.cast(low + chroma * math.clamp(math.abs(6.0 * t - 3.0) - 1.0, 0.0, 1.0), dtype=types.UINT8)


@pipeline_def(enable_conditionals=True)
def two_views(source: Iterator[tuple[Any, ...]], size: int, device: str) -> tuple[Node, Node]:
    """Encoded files and their `ViewParameters` to two uint8 `[size,size,3]` views on `device` ("cpu" or "gpu")."""
    encoded, *drawn = fn.external_source(source=source, num_outputs=1 + len(ViewParameters._fields))
    decoder = "mixed" if device == "gpu" else "cpu"
    image = fn.decoders.image(
        encoded, device=decoder, output_type=types.RGB, adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    views = []
    for view in (0, 1):
        p = ViewParameters(*(values[view] for values in drawn))
        factors: Node = p.factors
        if device == "gpu":
            factors = factors.gpu()
        x = fn.slice(image, start=p.crop[0:2], shape=p.crop[2:4], axes=(0, 1))
        x = fn.resize(x, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        if p.jitter:
            for slot in range(4):
                which = p.order[slot]
                if which == 0:
                    x = fn.brightness(x, brightness=p.factors[0])
                elif which == 1:
                    x = _contrast(x, factors[1])
                elif which == 2:
                    x = fn.saturation(x, saturation=p.factors[2])
                else:
                    x = _hue(x, factors[3])
        if p.grey:
            x = fn.saturation(x, saturation=0.0)
        if p.blur:
            x = fn.gaussian_blur(x, sigma=p.sigma, window_size=p.window)
        x = fn.flip(x, horizontal=fn.cast(p.flip, dtype=types.INT32))
        views.append(x)
    return views[0], views[1]


def read_encoded(images: ImageList, index: int) -> Encoded:
    """Bytes DALI is sure to decode, (height, width) in pixels, and the unreadable images passed over.

    A whole RGB or grey JPEG is handed over as it is; anything else is decoded here and handed over as PPM.
    """
    try:
        data = np.fromfile(images.path(index), dtype=np.uint8)
        with Image.open(io.BytesIO(data.data)) as image:
            # some cameras and servers pad the file with zeros after its end
            if image.format == "JPEG" and image.mode in ("RGB", "L") and END_OF_JPEG in data[-64:].tobytes():
                return data, (image.height, image.width), []
    except Exception:  # PIL raises whatever the broken bytes lead it to; the next line says what is wrong
        pass
    return read_decoded(images, index)


def read_decoded(images: ImageList, index: int) -> Encoded:
    """Image `index`, or the next readable one, decoded by PIL and handed over as PPM; as `read_encoded`."""
    picture, bad = read_rgb_or_next(images, index)
    header = b"P6 %d %d 255\n" % picture.size
    data = np.frombuffer(header + picture.tobytes(), dtype=np.uint8)
    return data, (picture.height, picture.width), bad


class DaliViews:
    """Two views of each image through DALI on `device`, with `workers` CPU threads."""

    def __init__(
        self,
        images: ImageList,
        *,
        image_size: int,
        batch_size: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype,
        workers: int,
        on_corrupt: str,
    ) -> None:
        self.images, self.image_size, self.batch_size, self.seed = images, image_size, batch_size, seed
        self.device, self.dtype, self.workers = device, dtype, max(workers, 1)
        self.bad = BadFiles(images, on_corrupt)
        self._threads = ThreadPoolExecutor(self.workers)
        self._undecodable: set[int] = set()  # sound ends, broken insides: PIL reads these, and names them

    def _read(self, index: int) -> Encoded:
        read = read_decoded if index in self._undecodable else read_encoded
        return read(self.images, index)

    def _source(self, step: int) -> Iterator[tuple[Any, ...]]:
        while True:
            epoch, indices = step_indices(len(self.images), self.batch_size, self.seed, step)
            files = list(self._threads.map(self._read, indices.tolist()))
            for _, _, bad in files:
                for index in bad:
                    self.bad.note(index)
            sizes = np.array([size for _, size, _ in files])
            yield [data for data, _, _ in files], *draw_parameters(self.seed, epoch, indices, sizes)
            step += 1

    def _pipeline(self, step: int) -> Any:
        gpu = self.device.type == "cuda"
        return two_views(
            self._source(step),
            self.image_size,
            "gpu" if gpu else "cpu",
            batch_size=self.batch_size,
            num_threads=self.workers,
            device_id=(self.device.index or 0) if gpu else None,
        )

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        step, pipeline = start_step, self._pipeline(start_step)
        used: torch.cuda.Event | None = None
        while True:
            if used:
                used.synchronize()  # DALI may overwrite the last batch from here on
            try:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                first, second = (torch.from_dlpack(view.as_tensor()) for view in pipeline.run(stream))
            except RuntimeError:
                ahead = [step_indices(len(self.images), self.batch_size, self.seed, step + i)[1] for i in range(3)]
                broken = {index for index in np.concatenate(ahead).tolist() if self._is_broken(index)}
                if broken <= self._undecodable:
                    raise
                self._undecodable |= broken
                pipeline = self._pipeline(step)
                continue
            batch = Batch(normalise(first, self.dtype), normalise(second, self.dtype))
            if stream is not None:
                used = stream.record_event()
            yield batch
            step += 1

    def _is_broken(self, index: int) -> bool:
        try:
            read_rgb(self.images.path(index))
        except OSError:
            return True
        return False
