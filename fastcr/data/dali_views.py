"""Files to two views with NVIDIA DALI: it decodes each image once, on the CPU or the GPU, and `cut_views` cuts both.

DALI gets the bytes of the files from here, so its pipeline has no state: order, seeds, resume and the views themselves
are those of `torch_views`.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fastcr.data.cached_views import cut_views, view_table
from fastcr.data.images import ImageList, orientation_of
from fastcr.data.views import Batch, Views, draw_parameters

END_OF_JPEG = b"\xff\xd9"
AHEAD = 3  # steps: the one DALI is asked for, and those it may decode while that one is used
Encoded = tuple[np.ndarray, list[int]]


@pipeline_def
def decoded(source: Iterator[list[np.ndarray]], decoder: str) -> Any:
    """Batches of encoded files to RGB pixels `[H,W,3]`, by DALI's "cpu" or "mixed" (GPU) decoder."""
    return fn.decoders.image(
        fn.external_source(source=source),
        device=decoder,
        output_type=types.RGB,
        adjust_orientation=False,  # whatever is to be turned comes from PIL
        jpeg_fancy_upsampling=True,
    )


def read_encoded(images: ImageList, index: int, by_pil: bool) -> Encoded:
    """Bytes DALI is sure to decode, and the images skipped as unreadable.

    A whole RGB or grey JPEG that is the right way up is handed over as it is; anything else, or all `by_pil`, is
    decoded here and handed over as PPM.
    """
    try:
        data = np.frombuffer(images.read(index), dtype=np.uint8)
        with Image.open(io.BytesIO(data.data)) as image:
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and orientation_of(image) == 1
        # some cameras and servers pad the file with zeros after its end
        whole = plain and END_OF_JPEG in data[-64:].tobytes()
    except Exception:  # PIL raises whatever the broken bytes lead it to; what is wrong is said below
        whole = False
    if whole and not by_pil:
        return data, []
    rgb, bad = images.rgb_or_next(index)
    return np.frombuffer(b"P6 %d %d 255\n" % rgb.size + rgb.tobytes(), dtype=np.uint8), bad


@dataclass
class DaliViews(Views):
    """Two views of each image, decoded by DALI."""

    # PIL reads these: sound ends, broken insides, or more than DALI can
    _undecodable: set[int] = field(default_factory=set)

    def batches(self, start_step: int) -> Generator[Batch, None, None]:
        """Batches from `start_step` on, epoch after epoch, without end."""
        loading, device = self.loading, self.loading.context.device
        step, pipeline = start_step, self._pipeline(start_step)
        stream = used = None
        while True:
            if device.type == "cuda":
                stream = torch.cuda.current_stream(device)
            if used:
                used.synchronize()  # DALI may overwrite the last batch from here on
            try:
                (images,) = pipeline.run(stream)
            except RuntimeError:
                ahead = islice(loading.steps(len(self.images), step), AHEAD)
                indices = {index for _, batch in ahead for index in batch.tolist()} - self._undecodable
                if not indices:
                    raise
                # those that PIL cannot read either, which it names; or else all that DALI had before it
                self._undecodable |= {index for index in indices if self.images.rgb_or_next(index)[1]} or indices
                pipeline = self._pipeline(step)
                continue
            batch = self._cut(step, images)
            if stream:
                used = stream.record_event()
            yield batch
            step += 1

    def _cut(self, step: int, images: Any) -> Batch:
        """The views of the images of `step`, which DALI has decoded."""
        loading = self.loading
        epoch, indices = next(loading.steps(len(self.images), step))
        pixels = [torch.from_dlpack(image) for image in images]
        sizes = np.array([image.shape[:2] for image in pixels])
        lengths = 3 * sizes.prod(1)
        table = view_table(draw_parameters(loading.seed, epoch, indices, sizes, loading.views))
        in_a_row = torch.cat([image.flatten() for image in pixels])
        return cut_views(in_a_row, lengths.cumsum() - lengths, sizes[:, 1], table, indices, loading)

    def _pipeline(self, step: int) -> Any:
        device = self.loading.context.device
        gpu = device.type == "cuda"
        return decoded(
            self._files(step),
            "mixed" if gpu else "cpu",
            batch_size=self.loading.batch_size,
            num_threads=max(self.loading.context.workers, 1),
            device_id=(device.index or 0) if gpu else None,
        )

    def _files(self, step: int) -> Iterator[list[np.ndarray]]:
        with ThreadPoolExecutor(max(self.loading.context.workers, 1)) as threads:
            for _, indices in self.loading.steps(len(self.images), step):
                by_pil = [index in self._undecodable for index in indices.tolist()]
                files = list(threads.map(partial(read_encoded, self.images), indices.tolist(), by_pil))
                for index in chain.from_iterable(bad for _, bad in files):
                    self.bad.note(index)
                yield [data for data, _ in files]
