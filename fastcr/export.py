"""`fastcr export RUN|WEIGHTS --format safetensors|torch|onnx|hub`: a trained encoder for other tools.

safetensors  torchvision's or timm's names for the backbone, `branch.*` for the branch
torch        a graph for `torch.export.load`, any batch; the facts in its extra file `fastcr.json`
onnx         opset 18, plain operators, any batch; the facts in its metadata
hub          a folder for the Hugging Face Hub: weights, settings, model card; `--push REPO` uploads it
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from fastcr import __version__
from fastcr.arguments import ExportConfig, read_arguments
from fastcr.config import Config
from fastcr.encoders.encoder import Encoder, find_weights, folder_of, load
from fastcr.encoders.hub import reason
from fastcr.errors import UsageError, one_line
from fastcr.output.tables import results_tables
from fastcr.runs.checkpoint import save_weights, write_whole
from fastcr.runs.command_line import load_config, one_line_errors

OPSET = 18
ENDINGS = {"safetensors": "-export.safetensors", "torch": ".pt2", "onnx": ".onnx", "hub": "-hub"}


def usual_names(encoder: Encoder) -> dict[str, Tensor]:
    """State dict with torchvision's or timm's names for the backbone (`layer1.0.conv1.weight`) and `branch.*`."""
    return {key.removeprefix("backbone.").removeprefix("timm."): each for key, each in encoder.state_dict().items()}


class _Graph(nn.Module):
    """The encoder with a plain tuple for its result: a saved graph must not need a class of fastcr."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding, attention = self.encoder(images)
        return embedding, attention


def graph_of(encoder: Encoder) -> torch.export.ExportedProgram:
    """Graph from `images [B,3,S,S]` to `(embedding [B,C], attention [B,h,w])`, any B, S as in training.

    The encoder must be on the CPU: there the branch is plain torch. `UsageError` for a released branch, and
    for an encoder that torch cannot export.
    """
    if encoder.facts["attention"] == "batch-minmax":
        raise UsageError(
            "the attention of a released checkpoint is scaled over the whole batch, so a graph would give an image "
            "another embedding in each batch: --format safetensors and hub take its weights"
        )
    encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,unused-ignore]  # else a warning for each weight
    images = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    batch = {"images": {0: torch.export.Dim("batch")}}
    with _exporting(encoder):
        return torch.export.export(_Graph(encoder).eval(), (images,), dynamic_shapes=batch)


@contextlib.contextmanager
def _exporting(encoder: Encoder) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a model of timm may do what has no place in a graph; the exporters say so at length
        raise UsageError(f"{encoder.facts['backbone']} cannot be made a graph: {one_line(error)}") from None


def write_torch(encoder: Encoder, out: Path) -> None:
    """Write the graph for `torch.export.load`."""
    buffer = io.BytesIO()
    torch.export.save(graph_of(encoder), buffer, extra_files={"fastcr.json": json.dumps(encoder.facts)})
    write_whole(out, lambda file: file.write_bytes(buffer.getbuffer()))


def write_onnx(encoder: Encoder, out: Path) -> None:
    """Write the graph as ONNX in one file. `UsageError` without onnx and onnxscript."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise UsageError('--format onnx needs onnx and onnxscript: pip install "fastcr[onnx]"') from None
    graph, outputs = graph_of(encoder), ["embedding", "attention"]
    with _exporting(encoder):
        program = torch.onnx.export(
            graph, dynamo=True, opset_version=OPSET, verbose=False, input_names=["images"], output_names=outputs
        )
    assert program is not None
    program.model.metadata_props["fastcr"] = json.dumps(encoder.facts)
    write_whole(out, lambda file: file.write_bytes(program.model_proto.SerializeToString()))


def write_hub(encoder: Encoder, out: Path, run: Path | None, repo: str | None) -> None:
    """Write the folder, whole or not at all: `model.safetensors`, `config.json`, `README.md` (the model card).

    Settings and results are those of the folder `run`, if there are any; of paths only the last name is kept.
    """
    config = load_config(run / "config.yaml") if run and (run / "config.yaml").is_file() else None
    training = training_settings(config) if config else None
    about = {"library_name": "fastcr", "fastcr_version": __version__, "facts": encoder.facts, "training": training}
    card = model_card(encoder, training, read_results(run), repo)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        folder = Path(scratch) / out.name
        folder.mkdir()
        save_weights(folder / "model.safetensors", encoder.state_dict(), encoder.facts)
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")
        os.rename(folder, out)


def training_settings(config: Config) -> dict[str, Any]:
    """What a reader of the model card wants to know of a run, without the paths of the machine it ran on."""
    parts = ["model", "optim", "moco", "rationale"]
    settings = {part: dataclasses.asdict(getattr(config, part)) for part in parts}
    settings["model"]["weights"] = Path(config.model.weights).name
    root = config.data.root
    data_set = (root.name or "a folder") if root else "the drawn birds of fastcr"
    run = {name: getattr(config.run, name) for name in ("seed", "steps", "precision")}
    data = {"root": data_set, "image_size": config.data.image_size}
    return {"preset": config.preset, "data": data, **settings, "run": run}


def read_results(run: Path | None) -> dict[str, Any] | None:
    """The results of a run for the model card, if it has any. `UsageError` if results.json is broken."""
    file = run / "results.json" if run else None
    if file is None or not file.is_file():
        return None
    try:
        results = json.loads(file.read_text())
        parts, folder = list(results_tables(results)), Path(results["folder"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is broken: it does not hold results ({error!r})") from None
    return {
        "name": folder.parent.name if folder.name in ("train", "test", "images") else folder.name,
        "frozen": "frozen_init" in results,
        "lines": [part for part in parts if isinstance(part, str)],
        "tables": [
            {
                "title": part.title,
                "heads": [str(column.header).replace("\n", ", ") for column in part.columns],
                "rows": list(zip(*(column.cells for column in part.columns), strict=True)),
            }
            for part in parts
            if isinstance(part, Table)
        ],
    }


def model_card(
    encoder: Encoder, training: dict[str, Any] | None, results: dict[str, Any] | None, repo: str | None
) -> str:
    """The README.md of a Hub repository: front matter, use, training, results, limitations."""
    from huggingface_hub import ModelCard, ModelCardData

    tags = ["fastcr", "self-supervised-learning", "contrastive-learning", "fine-grained"]
    front = ModelCardData(
        library_name="fastcr", license="apache-2.0", pipeline_tag="image-feature-extraction", tags=tags
    )
    facts, side = encoder.facts, encoder.image_size
    embedding, attention = (list(each.shape) for each in encoder(torch.zeros(1, 3, side, side)))
    card = ModelCard.from_template(
        front,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        facts=facts,
        branch=f"a rationale branch of {facts['detectors']} detectors" if encoder.branch else "no rationale branch",
        embedding=embedding,
        attention=attention,
        training=training,
        settings=yaml.safe_dump(training, sort_keys=False),
        results=results,
        repo=repo,
        version=__version__,
    )
    return f"{card}\n"


def push(folder: Path, repo: str) -> str:
    """Upload `folder` to the Hub, into a repository that is made if need be; returns its address.

    `UsageError` for whatever keeps it from there.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        address = str(api.create_repo(repo, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Exported by fastcr {__version__}")
    except Exception as error:  # as in `fetch`
        later = f"later: hf upload {repo} {folder}"
        raise UsageError(f"{folder} is written, but not pushed to {repo}: {reason(error)}; {later}") from None
    return address


def check_hub(push: bool) -> None:
    """`UsageError` without huggingface_hub, or to `push` without the user's token."""
    try:
        from huggingface_hub import get_token
    except ImportError:
        raise UsageError('--format hub needs huggingface_hub: pip install "fastcr[hub]"') from None
    if push and not get_token():
        raise UsageError("--push needs your Hugging Face token: run hf auth login, or set HF_TOKEN")


def destination(config: ExportConfig, weights: Path) -> Path:
    """What to write. `UsageError` if it is there already, or its name ends wrongly."""
    out = config.out or folder_of(config.source) / (weights.stem + ENDINGS[config.format])
    suffix = Path(f"name{ENDINGS[config.format]}").suffix
    if suffix and out.suffix != suffix:
        raise UsageError(f"--out must end in {suffix} with --format {config.format}, got {out}")
    if out.exists():
        raise UsageError(f"{out} is there already: name another --out")
    return out


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr export`."""
    console = Console(markup=False)
    say = partial(console.print, soft_wrap=True, highlight=False)
    with one_line_errors("export"):
        config: ExportConfig = read_arguments("export", args)
        if config.push and config.format != "hub":
            raise UsageError("--push goes with --format hub")
        if config.format == "hub":
            check_hub(push=bool(config.push))
        weights = find_weights(config.source)
        out, encoder = destination(config, weights), load(weights)
        out.parent.mkdir(parents=True, exist_ok=True)
        if config.format == "safetensors":
            save_weights(out, usual_names(encoder), encoder.facts)
        elif config.format == "torch":
            write_torch(encoder, out)
        elif config.format == "onnx":
            write_onnx(encoder, out)
        else:
            write_hub(encoder, out, config.source if config.source.is_dir() else None, config.push)
        say(f"exported: {out}")
        if config.push:
            say(f"pushed: {push(out, config.push)}")


if __name__ == "__main__":
    main()
