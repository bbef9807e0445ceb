"""Files to two views with NVIDIA DALI, on the CPU or the GPU: each image is decoded once, both views are cut from it.

The augmentation is drawn outside (`views.draw_parameters`) and handed to DALI with the bytes of the files, so the
pipelines have no state: order, seeds, resume and the views themselves are those of `torch_views`. For the GPU DALI
decodes and `kernels/two_views.py` cuts the views; on the CPU DALI does both. There contrast and hue are built from
arithmetic, because DALI's own differ from torchvision's (contrast about a fixed grey, hue in YIQ).
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
from torch import Tensor

from fastcr.data.cached_views import cut_views, view_table
from fastcr.data.images import ImageList, read_rgb_or_next
from fastcr.data.views import ALONE, BadFiles, Batch, Shard, ViewParameters, draw_parameters, normalise, step_indices
from fastcr.kernels.launch import Impl

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


def _decode(encoded: Node, box: Node, device: str, **settings: Any) -> Node:
    """RGB pixels of `box` (top, left, height, width) of each image."""
    return fn.decoders.image_slice(
        encoded,
        start=box[0:2],
        shape=box[2:4],
        axes=(0, 1),
        device=device,
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
        **settings,
    )


@pipeline_def
def decoded(source: Iterator[tuple[Any, ...]], decoder: str, hw_decoder_load: float) -> tuple[Node, ...]:
    """Encoded files, boxes and view tables to pixels (flat, padded to the longest), boxes and tables, on one device."""
    encoded, box, table = fn.external_source(source=source, num_outputs=3)
    settings = {"hw_decoder_load": hw_decoder_load} if decoder == "mixed" else {}
    pixels = fn.pad(fn.reshape(_decode(encoded, box, decoder, **settings), shape=[-1]))
    return (pixels, box.gpu(), table.gpu()) if decoder == "mixed" else (pixels, box, table)


@pipeline_def(enable_conditionals=True)
def augmented(source: Iterator[tuple[Any, ...]], size: int) -> tuple[Node, Node]:
    """Encoded files, boxes and their `ViewParameters` to two uint8 `[size,size,3]` views, all on the CPU."""
    encoded, box, *drawn = fn.external_source(source=source, num_outputs=2 + len(ViewParameters._fields))
    image = _decode(encoded, box, "cpu")
    views = []
    for view in (0, 1):
        p = ViewParameters(*(values[view] for values in drawn))
        x = fn.slice(image, start=p.crop[0:2], shape=p.crop[2:4], axes=(0, 1))
        x = fn.resize(x, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        if p.jitter:
            for slot in range(4):
                which = p.order[slot]
                if which == 0:
                    x = fn.brightness(x, brightness=p.factors[0])
                elif which == 1:
                    x = _contrast(x, p.factors[1])
                elif which == 2:
                    x = fn.saturation(x, saturation=p.factors[2])
                else:
                    x = _hue(x, p.factors[3])
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
        data = np.frombuffer(images.read(index), dtype=np.uint8)
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
    """Two views of each image through DALI on `device`, with `workers` CPU threads.

    roi_decode: decode of each image only what its two views show. hw_decoder_load: share of the JPEGs that the GPU's
    own decoder gets, where it has one; the rest is decoded by its general cores.
    """

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
        bad: BadFiles,
        shard: Shard = ALONE,
        roi_decode: bool = False,
        hw_decoder_load: float = 0.65,
    ) -> None:
        self.images, self.image_size, self.batch_size, self.seed = images, image_size, batch_size, seed
        self.device, self.dtype, self.workers, self.shard = device, dtype, max(workers, 1), shard
        self.roi_decode, self.hw_decoder_load = roi_decode, hw_decoder_load
        self.decode_only = device.type == "cuda"
        self.impl: Impl = "auto"
        self.bad = bad
        self._threads = ThreadPoolExecutor(self.workers)
        self._undecodable: set[int] = set()  # sound ends, broken insides: PIL reads these, and names them

    def _read(self, index: int) -> Encoded:
        read = read_decoded if index in self._undecodable else read_encoded
        return read(self.images, index)

    def _source(self, step: int) -> Iterator[tuple[Any, ...]]:
        while True:
            epoch, indices = self._indices(step)
            files = list(self._threads.map(self._read, indices.tolist()))
            for _, _, bad in files:
                for index in bad:
                    self.bad.note(index)
            sizes = np.array([size for _, size, _ in files], dtype=np.int32)
            parameters = draw_parameters(self.seed, epoch, indices, sizes)
            box = np.concatenate([np.zeros_like(sizes), sizes], axis=1)
            if self.roi_decode:
                crop = parameters.crop
                start, end = crop[..., :2].min(1), (crop[..., :2] + crop[..., 2:]).max(1)
                box = np.concatenate([start, end - start], axis=1)
                crop[..., :2] -= start[:, None]
            drawn = (view_table(parameters),) if self.decode_only else parameters
            yield [data for data, _, _ in files], box, *drawn
            step += 1

    def _indices(self, step: int) -> tuple[int, np.ndarray]:
        return step_indices(len(self.images), self.batch_size, self.seed, step, self.shard)

    def _pipeline(self, step: int) -> Any:
        gpu = self.device.type == "cuda"
        settings = {
            "batch_size": self.batch_size,
            "num_threads": self.workers,
            "device_id": (self.device.index or 0) if gpu else None,
        }
        if self.decode_only:
            return decoded(self._source(step), "mixed" if gpu else "cpu", self.hw_decoder_load, **settings)
        return augmented(self._source(step), self.image_size, **settings)

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        step, pipeline = start_step, self._pipeline(start_step)
        used: torch.cuda.Event | None = None
        while True:
            if used:
                used.synchronize()  # DALI may overwrite the last batch from here on
            try:
                stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
                outputs = [torch.from_dlpack(output.as_tensor()) for output in pipeline.run(stream)]
            except RuntimeError:
                ahead = [self._indices(step + i)[1] for i in range(3)]
                broken = {index for index in np.concatenate(ahead).tolist() if self._is_broken(index)}
                if broken <= self._undecodable:
                    raise
                self._undecodable |= broken
                pipeline = self._pipeline(step)
                continue
            batch = self._finish(*outputs)
            if stream is not None:
                used = stream.record_event()
            yield batch
            step += 1

    def _finish(self, *outputs: Tensor) -> Batch:
        if not self.decode_only:
            first, second = outputs
            return Batch(normalise(first, self.dtype), normalise(second, self.dtype))
        pixels, box, table = outputs
        starts = torch.arange(len(pixels), device=pixels.device) * pixels.shape[1]
        settings: dict[str, Any] = {"size": self.image_size, "dtype": self.dtype, "impl": self.impl}
        return cut_views(pixels.view(-1), starts, box[:, 3].long(), table, **settings)

    def _is_broken(self, index: int) -> bool:
        try:
            self.images.rgb(index)
        except OSError:
            return True
        return False
