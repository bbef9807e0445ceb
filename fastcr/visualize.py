"""`fastcr visualize RUN|WEIGHTS IMAGE|FOLDER...`: where the attention lies.

Images are shown as evaluation sees them. The released branch scales its attention over a whole batch: there, a map
depends on which other images are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastcr.arguments import VisualizeConfig, read_arguments
from fastcr.data.synthetic import write_synthetic
from fastcr.encoders.encoder import load
from fastcr.encoders.hub import find_weights, folder_of
from fastcr.errors import UsageError
from fastcr.output.gallery import attended, list_images, read_pictures, spread
from fastcr.output.sheets import GRID, PAGE, Section, check_out, write_grid, write_page
from fastcr.runs.command_line import load_config, one_line_errors
from fastcr.runs.context import Context


@torch.inference_mode()
def visualize(config: VisualizeConfig, context: Context) -> None:
    """Write the grid or the page; see the module's first lines.

    Raises `UsageError` for weights without a branch, or if there is no image to show.
    """
    weights, sources = find_weights(config.source), config.images
    if not sources and not config.source.is_dir():
        raise UsageError("a weights file needs an IMAGE or a FOLDER of them after it")
    out = config.out or folder_of(config.source) / "attention.png"
    check_out(out, GRID, PAGE)
    sources = sources or (load_config(config.source / "config.yaml").data.root or write_synthetic(),)
    encoder = load(weights, context.device, image_size=config.image_size)
    if encoder.branch is None:
        raise UsageError(f"{weights} has no attention branch, so there is no attention to show")
    pictures, reasons = read_pictures(spread(list_images(sources), config.limit), encoder.image_size)
    if not pictures:
        raise UsageError(f"none of the {len(reasons)} images can be read: {reasons[0]}")
    tiles = attended(list(pictures.values()), encoder, context)
    text = "Each map is warm where the attention is high, and is scaled to its own maximum."
    if out.suffix.lower() == GRID:
        write_grid(out, tiles)
    else:
        write_page(out, f"Attention of {weights.name}", [Section(text=text, rows=[tiles])])
    for reason in reasons:
        context.say(f"left out: {reason}")
    context.say(out)


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr visualize`."""
    with one_line_errors("visualize"):
        config: VisualizeConfig = read_arguments("visualize", args)
        visualize(config, Context.of(config.run.device, "fp32"))


if __name__ == "__main__":
    main()
