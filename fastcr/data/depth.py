"""Values of more than 8 bits as bytes: scaled by what their file says of them, or else by what they hold."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

TOPS = [2**bits - 1 for bits in (8, 10, 12, 14, 16)]  # greatest values of cameras, scanners and microscopes
NO_DATA = (-999, -9999, -99_999, -32_767, -32_768, -(2**31))  # where it is the least value
HUGE = 1e30  # no data beyond it
WHOLE = "from 0 to 65,535"  # goes without saying
SCALED = "fastcr scaled"  # key of PIL's facts of an image: from which range, in words
BITS, PHOTOMETRIC, LEAST, MOST, PLANAR, NO_DATA_TAG = (258,), (262,), (340, 280), (341, 281), 284, 42_113  # TIFF's


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened image of any mode as RGB, 8 bits: deeper values are scaled (PIL would clip them), alpha is dropped.

    Of colours of 16 bits these are the upper 8, as PIL gives them.
    The range that becomes 0 to 255 is the first of these that there is:
    - what TIFF's tags say: the least and the greatest sample value, or a depth below 16 bits;
    - from 0 to 1 (floats only), or to the greatest value of 8, 10, 12, 14 or 16 bits: the first that holds all values,
      but for floats that fill less than a sixteenth of it;
    - the image's own, from its least to its greatest value.
    No data is left out, and black: what GDAL's tag says, the usual values, NaN and infinity. What was done is said
    once on stderr, and is kept in the image's `info`.
    """
    name, tags = getattr(image, "filename", ""), dict(getattr(image, "tag_v2", ()))
    if tags.get(PLANAR) == 2 and image.mode.startswith("RGB") and np.max(tags.get(BITS[0], 8)) > 8:
        raise OSError("colours of 16 bits in planes, which PIL takes for 8 bits: save them pixel by pixel")
    vars(image)["filename"] = ""  # PIL maps files that it knows by name, and scrambles TIFFs that are to be turned
    image.load()
    vars(image)["filename"] = name
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image if image.mode == "RGB" else image.convert("RGB")  # a copy of a large image costs memory
    deep, of_16 = np.asarray(image), image.format == "PPM" and image.mode == "I"  # PIL has scaled these
    pixels, words = to_bytes(deep, tags, of_16=of_16)
    rgb = Image.fromarray(pixels).convert("RGB")
    rgb.info[SCALED] = words
    if words != WHOLE:
        say(words)
    return rgb


@cache
def say(words: str) -> None:
    """Say what is scaled, once; of several loader processes, the first does."""
    from torch.utils.data import get_worker_info  # heavy, and loaded already where there are any

    worker = get_worker_info()
    if worker is None or worker.id == 0:
        print(f"fastcr: pixels of more than 8 bits are scaled, {words}", file=sys.stderr)


def to_bytes(values: np.ndarray, tags: dict[int, Any], *, of_16: bool = False) -> tuple[np.ndarray, str]:
    """Deep `values` as bytes, and the range that they were scaled from in words; `tags` are TIFF's."""

    def number(names: tuple[int, ...]) -> float | None:
        found = (np.ravel(tags[name])[0] for name in names if np.size(tags.get(name, ())))
        return next((float(each) for each in found if isinstance(each, (int, float, np.number))), None)

    integers, values = values.dtype.kind in "iu", values.astype(np.float64)
    empty = ~np.isfinite(values) | (abs(values) >= HUGE)
    with suppress(ValueError):
        empty |= np.isclose(values, float(str(tags.get(NO_DATA_TAG, "")).strip("\0 ")))
    least = values.min(where=~empty, initial=np.inf)
    if least in NO_DATA:
        empty |= values == least
    held = values[~empty] if not empty.all() else np.zeros(1)
    low, high = held.min(), held.max()
    if integers and high == TOPS[-1] and (below := held[held < high]).size and below.max() <= TOPS[-2]:
        high = below.max()  # 65,535 of saturated pixels or no data among 14 bits or fewer
    bits, first, last = number(BITS) or 16, number(LEAST) or 0.0, number(MOST)
    tops = [TOPS[-1]] if of_16 else [top for top in TOPS if bits >= 16 or top >= 2**bits - 1]
    tops = tops if integers else [1, *tops]
    top = next((top for top in tops if low >= 0 and high <= top and (integers or top == 1 or high >= top / 16)), None)
    if last is not None and first <= low and high <= last and first < last < 2**bits - 1:
        low, high = first, last
    elif top is not None:
        low, high = 0, top
    else:
        last = None
    fixed = top is not None or last is not None
    words = f"from {low:,.6g} to {high:,.6g}" if fixed else "each from its least to its greatest value"
    scaled = np.rint((np.where(empty, low, values) - low) * (255 / max(high - low, 1e-12))).clip(0, 255)
    scaled = 255 - scaled if number(PHOTOMETRIC) == 0 else scaled  # PIL inverts these of 8 bits alone
    return np.where(empty, 0, scaled).astype(np.uint8), f"{words}, no data black" if empty.any() else words
