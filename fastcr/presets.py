"""One preset per data set: `python -m fastcr.train NAME`, every flag can be overridden after it.

Each docstring states what to expect. Where a figure has not been measured with this code it says so.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from fastcr.checkpoint import has_resume
from fastcr.cli import load_config, parse
from fastcr.config import (
    Config,
    DataConfig,
    MocoConfig,
    ModelConfig,
    OptimConfig,
    RationaleConfig,
    ReleasedConfig,
    UsageError,
    validate,
)

# from a good initialisation, for some thousand images: docs/evidence.md
GENTLE_OPTIM = OptimConfig(backbone_warmup=3, backbone_lr=0.001)
GENTLE_MOCO = MocoConfig(key_momentum=0.99)


def synthetic() -> Config:
    """Drawn birds, 16 classes that differ only in small parts; ResNet-18 from random weights at 64 px.

    A minute and a half on two CPU cores shows every part at work: both losses fall. It is far too short for features
    fine enough to tell the classes: retrieval stays near chance (rank-1 6.25 %).
    """
    return Config(
        preset="synthetic",
        data=DataConfig(image_size=64),
        model=ModelConfig(backbone="resnet18", last_stage="layer3", weights="none"),
        optim=OptimConfig(epochs=8, batch_size=64),
        moco=MocoConfig(queue_size=256, key_momentum=0.99, embedding_dim=128),
    )


def cub200() -> Config:
    """CUB-200-2011 (5,994 training images), ResNet-50 from ImageNet: 100 epochs, 224 px.

    The paper's recipe but for what docs/evidence.md found: GradCAM of the own key's logit with channel weights common
    to the batch, a backbone that is held for three epochs and then learns slowly, keys that follow faster. There (a
    ResNet-18, fifty classes that nothing was chosen on, ten epochs) rationale pooling retrieves 38.2 at rank-1, MoCo
    v2's mean pooling 25.2, random detectors on the untouched encoder 30.6. The paper itself has `--rationale.cam_of
    loss --rationale.cam_weights own --optim.backbone_warmup 0 --optim.backbone_lr None --moco.key_momentum 0.999`, and
    reports 49.69 (MoCo v2: 17.07) on all classes at this size, which has not yet been measured with this code.
    """
    return Config(preset="cub200", optim=GENTLE_OPTIM, moco=GENTLE_MOCO)


def cub200_released() -> Config:
    """CUB-200-2011 with the branch, fit loss and queue of the authors' released code; not yet measured.

    The fit weight 0.01 is on the KL summed over the batch.
    """
    return Config(
        preset="cub200-released",
        moco=MocoConfig(queue_size=65536),
        rationale=RationaleConfig(fit_weight=0.01),
        released=ReleasedConfig(enabled=True),
    )


def cars196() -> Config:
    """Stanford Cars (8,144 training images), the original archive or class folders; the recipe of `cub200`.

    The archive's tables need scipy (`pip install "fastcr[archives]"`). The paper reports a linear probe of 76.6. Not
    yet measured with this code.
    """
    return Config(preset="cars196", optim=GENTLE_OPTIM, moco=GENTLE_MOCO)


def aircraft() -> Config:
    """FGVC-Aircraft (6,667 trainval images), the original archive or class folders; the recipe of `cub200`.

    The archive is read at the level of variants. Not yet measured with this code.
    """
    return Config(preset="aircraft", optim=GENTLE_OPTIM, moco=GENTLE_MOCO)


def inat2019() -> Config:
    """iNaturalist 2019 (265,213 training images), the original archive or class folders; larger queue and batch.

    So many images may well teach the backbone: it learns at the paper's rate.
    The archive's validation list is the test split: no labels of its test images are public. Not yet measured with this
    code.
    """
    return Config(
        preset="inat2019",
        optim=OptimConfig(batch_size=256),
        moco=MocoConfig(queue_size=65536),
    )


def folder() -> Config:
    """Your own images, labelled or not (`--data.root DIR`): the recipe of `cub200`; see docs/evidence.md."""
    return Config(preset="folder", optim=GENTLE_OPTIM, moco=GENTLE_MOCO)


PRESETS: dict[str, Callable[[], Config]] = {
    "synthetic": synthetic,
    "cub200": cub200,
    "cub200-released": cub200_released,
    "cars196": cars196,
    "aircraft": aircraft,
    "inat2019": inat2019,
    "folder": folder,
}


def read_command_line(args: Sequence[str]) -> tuple[Config, Path | None]:
    """`[PRESET | --resume RUN] [--section.field value ...]` to settings and the run to go on with.

    `PRESET --run.dir RUN --resume auto` goes on with RUN if it has saved anything, and begins it if not.
    """
    args = [part for arg in args for part in (arg.split("=", 1) if arg.startswith("--resume=") else [arg])]
    resume = None
    if "--resume" in args:
        at = args.index("--resume")
        if at + 1 == len(args) or args[at + 1].startswith("--"):
            raise UsageError("--resume needs a run folder, or auto and --run.dir")
        resume = Path(args[at + 1])
        del args[at : at + 2]
        if str(resume) == "auto":
            resume = run_to_go_on_with(args)
            if resume and args and not args[0].startswith("-"):
                del args[0]  # the preset: config.yaml has what came of it
        elif not resume.is_dir():
            raise UsageError(f"no run folder {resume}")
    if resume:
        default = load_config(resume / "config.yaml")
    else:
        name = args.pop(0) if args and not args[0].startswith("-") else "synthetic"
        if name not in PRESETS:
            guess = difflib.get_close_matches(name, PRESETS, n=1)
            hint = f"did you mean {guess[0]}?" if guess else f"there are {', '.join(PRESETS)}"
            raise UsageError(f"no preset {name!r} ({hint})")
        default = PRESETS[name]()
    presets = "\n".join(f"  {name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
    config = parse(
        Config,
        args,
        default=default,
        prog="python -m fastcr.train [PRESET | --resume RUN]",
        description=f"Train common rationales on unlabelled images.\n\nPresets:\n{presets}",
    )
    if resume and (config.run.seed, config.optim.batch_size) != (default.run.seed, default.optim.batch_size):
        raise UsageError("--run.seed and --optim.batch_size of a run cannot change: they order its images")
    return validate(config), resume


def run_to_go_on_with(args: Sequence[str]) -> Path | None:
    """The folder that `--run.dir` names among `args`, if a run has saved anything there. `UsageError` without it."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    reader.add_argument("--run.dir", "--run-dir", dest="dir", type=Path)
    try:
        folder = reader.parse_known_args(args)[0].dir
    except argparse.ArgumentError:
        folder = None
    if folder is None:
        raise UsageError("--resume auto needs --run.dir, the folder to look for the run in")
    return folder if has_resume(folder / "resume.pt") else None
