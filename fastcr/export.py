"""`fastcr export RUN|WEIGHTS --format safetensors|torch|onnx|hub`: a trained encoder for other tools.

safetensors  torchvision's or timm's names for the backbone, `branch.*` for the branch
torch        a graph for `torch.export.load`, any batch; the facts in its extra file `fastcr.json`
onnx         opset 18, plain operators, any batch; the facts in its metadata
hub          a folder for the Hugging Face Hub: weights and model card; `hf upload` sends it there
"""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from jinja2 import Template
from torch import Tensor, nn

from fastcr import __version__
from fastcr.arguments import ExportConfig, read_arguments
from fastcr.config import Config
from fastcr.encoders.encoder import Encoder, load
from fastcr.encoders.hub import find_weights, folder_of
from fastcr.errors import UsageError, one_line
from fastcr.measures.poolings import key_of, pooled
from fastcr.output.tables import best_line, retrieval_table, text_of
from fastcr.runs.checkpoint import new_folder, save_weights, write_whole
from fastcr.runs.command_line import load_config, one_line_errors
from fastcr.runs.context import Context

OPSET, ONNX = 18, ("onnx", "onnxscript")  # and the packages that write it
ENDINGS = {"safetensors": "-export.safetensors", "torch": ".pt2", "onnx": ".onnx", "hub": "-hub"}


class _Graph(nn.Module):
    """The encoder with a plain tuple for its result: a saved graph must not need a class of fastcr."""

    def __init__(self, encoder: Encoder, pooling: str) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.encoder.backbone(images)
        return pooled(features, self.encoder, self.pooling), self.encoder.encoded(features).attention


def graph_of(encoder: Encoder, pooling: str | None = None) -> torch.export.ExportedProgram:
    """Graph from `images [B,3,S,S]` to `(embedding [B,C], attention [B,h,w])`, any B, S as in training.

    `pooling` is what `--pooling` takes. The encoder must be on the CPU: there the branch is plain torch. `UsageError`
    for a released branch, whatever torch raises for an encoder that it cannot export.
    """
    if encoder.facts["attention"] == "batch-minmax":
        raise UsageError(
            "the attention of a released checkpoint is scaled over the whole batch, so a graph would give an image "
            "another embedding in each batch: --format safetensors and hub take its weights"
        )
    graph = _Graph(encoder, key_of(pooling, encoder)).eval()
    encoder.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload,unused-ignore]  # else a warning for each weight
    images = torch.zeros(2, 3, encoder.image_size, encoder.image_size)
    return torch.export.export(graph, (images,), dynamic_shapes={"images": {0: torch.export.Dim("batch")}})


def write_graph(encoder: Encoder, out: Path, format: str, pooling: str | None) -> None:
    """Write the graph for `torch.export.load`, or as ONNX in one file. `UsageError` if that cannot be done."""
    facts = json.dumps(encoder.facts | {"pooling": key_of(pooling, encoder)})
    try:
        graph = graph_of(encoder, pooling)
        if format == "torch":
            buffer = io.BytesIO()
            torch.export.save(graph, buffer, extra_files={"fastcr.json": facts})
            content = buffer.getvalue()
        else:
            names: dict[str, Any] = {"input_names": ["images"], "output_names": ["embedding", "attention"]}
            program = torch.onnx.export(graph, dynamo=True, opset_version=OPSET, verbose=False, **names)
            assert program is not None
            program.model.metadata_props["fastcr"] = facts
            content = program.model_proto.SerializeToString()
    except UsageError:
        raise
    except Exception as error:  # a model of timm may do what has no place in a graph; the exporters say so at length
        raise UsageError(f"{encoder.facts['backbone']} cannot be made a graph: {one_line(error)}") from None
    write_whole(out, lambda file: file.write_bytes(content))


def write_hub(encoder: Encoder, out: Path, run: Path) -> None:
    """Write the folder, whole or not at all: `model.safetensors`, `config.json`, `README.md` (the card).

    Settings and results are those of the folder `run`, if it has any; of paths only the last name is kept.
    `UsageError` if they are broken.
    """
    told: dict[str, Any] = {"name": out.name, "facts": encoder.facts, "version": __version__}
    if (run / "config.yaml").is_file():
        told["settings"] = yaml.safe_dump(training_settings(load_config(run / "config.yaml")), sort_keys=False)
    if (run / "results.json").is_file():
        told["results"] = results_of(run / "results.json")
    card = Template(files("fastcr").joinpath("model_card.md.jinja").read_text(encoding="utf-8")).render(told)
    # the Hub counts a download by this file
    about = {"library_name": "fastcr", "fastcr_version": __version__, "facts": encoder.facts}
    with new_folder(out) as folder:
        save_weights(folder / "model.safetensors", encoder.state_dict(), encoder.facts)
        (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        (folder / "README.md").write_text(f"{card}\n", encoding="utf-8")


def training_settings(config: Config) -> dict[str, Any]:
    """What a reader of the model card wants to know of a run, without the paths of the machine it ran on."""
    settings = {part: dataclasses.asdict(getattr(config, part)) for part in ("model", "optim", "moco", "rationale")}
    settings["model"]["weights"] = Path(config.model.weights).name
    data = config.data.root.name if config.data.root else "the drawn birds of fastcr"
    return {"preset": config.preset, "data": data, "seed": config.run.seed, "steps": config.run.steps, **settings}


def results_of(file: Path) -> str:
    """The table and the verdict of a run's end as Markdown. `UsageError` if the file is broken."""
    try:
        results = json.loads(file.read_text())
        table, verdict, folder = text_of(retrieval_table(results)), best_line(results) or "", Path(results["folder"])
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(f"{file} is broken: it does not hold results ({error!r})") from None
    data = folder.parent.name if folder.name in ("train", "test", "images") else folder.name
    rows = [table.head, ["---", *["--:"] * (len(table.head) - 1)], *table.rows]
    lines = [" ".join(f"| {' | '.join(row)} |".split()) for row in rows]
    return "\n".join([f"{data}, {table.caption}:", "", *lines, "", verdict])


def main(args: Sequence[str] | None = None) -> None:
    """Command line of `fastcr export`."""
    with one_line_errors("export"):
        config: ExportConfig = read_arguments("export", args)
        if config.pooling and config.format not in ("torch", "onnx"):
            raise UsageError("--pooling goes with --format torch and onnx: the others hold weights, not a graph")
        if config.format == "onnx" and (lacking := [each for each in ONNX if importlib.util.find_spec(each) is None]):
            raise UsageError(f'this export needs {lacking[0]}: pip install "fastcr[onnx]"')
        weights = find_weights(config.source)
        out = config.out or folder_of(config.source) / (weights.stem + ENDINGS[config.format])
        if out.exists():
            raise UsageError(f"{out} is there already: name another --out")
        encoder = load(weights, tuned=config.tuned, image_size=config.image_size)
        out.parent.mkdir(parents=True, exist_ok=True)
        if config.format == "safetensors":
            state = encoder.state_dict()
            usual = {name.removeprefix("backbone.").removeprefix("timm."): state[name] for name in state}
            save_weights(out, usual, encoder.facts)
        elif config.format == "hub":
            write_hub(encoder, out, config.source)
        else:
            write_graph(encoder, out, config.format, config.pooling)
        Context().say(f"exported: {out}")


if __name__ == "__main__":
    main()
