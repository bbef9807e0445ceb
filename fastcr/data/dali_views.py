"""Files to two views with NVIDIA DALI: it decodes each image once, on the CPU or the GPU, and `cut_views` cuts both.

DALI gets the bytes of the files from here, so its pipeline has no state: order, seeds, resume and the views themselves
are those of `torch_views`.
"""

from __future__ import annotations

import io
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from PIL import Image

from fastcr.data.cutting import cut_views, view_table
from fastcr.data.images import BadFiles, ImageList, orientation_of
from fastcr.data.views import Batch, Loading, draw_parameters

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


def dali_views(images: ImageList, loading: Loading, bad: BadFiles, start: int) -> Generator[Batch, None, None]:
    """Batches from step `start` on, decoded by DALI."""
    device, undecodable = loading.context.device, set[int]()  # PIL reads these: broken, or more than DALI can
    pipeline = pipeline_from(start, images, loading, bad, undecodable)
    stream = used = None
    for step, (epoch, indices) in enumerate(loading.steps(len(images), start), start):
        if device.type == "cuda":
            stream = torch.cuda.current_stream(device)
        if used:
            used.synchronize()  # DALI may overwrite the last batch from here on
        while True:
            try:
                (found,) = pipeline.run(stream)
                break
            except RuntimeError:
                ahead = islice(loading.steps(len(images), step), AHEAD)
                doubtful = {index for _, batch in ahead for index in batch.tolist()} - undecodable
                if not doubtful:
                    raise
                # those that PIL cannot read either, which it names; or else all that DALI had before it
                undecodable |= {index for index in doubtful if images.rgb_or_next(index)[1]} or doubtful
                pipeline = pipeline_from(step, images, loading, bad, undecodable)
        pixels = [torch.from_dlpack(image) for image in found]
        sizes = np.array([image.shape[:2] for image in pixels])
        lengths = 3 * sizes.prod(1)
        table = view_table(draw_parameters(loading.seed, epoch, indices, sizes, loading.views))
        in_a_row = torch.cat([image.flatten() for image in pixels])
        batch = cut_views(in_a_row, lengths.cumsum() - lengths, sizes[:, 1], table, indices, loading)
        used = stream.record_event() if stream else None
        yield batch


def pipeline_from(step: int, images: ImageList, loading: Loading, bad: BadFiles, by_pil: set[int]) -> Any:
    """DALI's pipeline, from this step on; what is in `by_pil` is decoded by PIL."""
    device, threads = loading.context.device, max(loading.context.workers, 1)

    def files() -> Iterator[list[np.ndarray]]:
        with ThreadPoolExecutor(threads) as pool:
            for _, indices in loading.steps(len(images), step):
                read = list(pool.map(lambda index: read_encoded(images, index, index in by_pil), indices.tolist()))
                for index in chain.from_iterable(unreadable for _, unreadable in read):
                    bad.note(index)
                yield [data for data, _ in read]

    decoder, number = ("mixed", device.index or 0) if device.type == "cuda" else ("cpu", None)
    return decoded(files(), decoder, batch_size=loading.batch_size, num_threads=threads, device_id=number)
