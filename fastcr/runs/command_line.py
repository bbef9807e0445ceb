"""Settings from a command line or a YAML file, and mistakes in one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import io
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from fastcr.config import Config, tyro
from fastcr.errors import UsageError, one_line
from fastcr.presets import PRESETS, preset
from fastcr.runs.validate import validate

C = TypeVar("C")
VIT = r"timm:(test_)?(vit|deit|beit|eva|flexivit|samvit)"  # ViTs: AdamW tunes them at a tenth of a CNN's rate
# the settings that people change, as `fastcr train --help` explains them
BASICS = {
    "data.root": "folder of images; docs/data.md lists the layouts",
    "run.dir": "run folder; runs/<preset>-<date>-<time> if not given",
    "model.backbone": "resnet18 to resnet152, or timm:NAME",
    "model.weights": "imagenet, none, a file, or a package that holds them",
    "data.image_size": "side of the square views, pixels",
    "optim.epochs": "passes over the images; 0 saves the start",
    "optim.batch_size": "images a step, of all processes together",
    "optim.lr": "highest learning rate",
    "optim.tuned": "where the saved encoder lies between start (0) and end (1)",
    "model.frozen_stages": "stages that stay as they are: a number, or half",
    "views.key_scale": "side of the key's view over that of the query's",
    "run.device": "cpu, cuda, cuda:N, or auto",
    "run.precision": "bf16, fp32, or auto",
    "run.seed": "of weights, order and augmentation",
    "data.workers": "loader processes; one a core if not given",
}


def called(command: str) -> str:
    """How the user calls `command`, for help and messages: `fastcr train` or `python -m fastcr.train`.

    The path of a script gives `python bench/tune.py`.
    """
    if command.endswith(".py"):
        return f"python {command}"
    program = Path(sys.argv[0])
    if program.name == "fastcr":
        return f"fastcr {command}"
    return f"python -m fastcr{' ' if program.parts[-2:] == ('fastcr', '__main__.py') else '.'}{command}"


def parse(
    cls: type[C], args: Sequence[str] | None, *, default: C | None = None, prog: str, description: str | None
) -> C:
    """`tyro.cli` with each mistake on one line; the settings it returns are validated. No `args`: those of the process.

    Raises `UsageError` for a flag or value it cannot use, or without tyro; prints and exits 0 for `--help`.
    """
    if tyro is None:
        raise UsageError("the command line needs tyro: pip install tyro")
    options: dict[str, Any] = {"use_underscores": True} | ({} if default is None else {"default": default})
    caught = io.StringIO()
    try:
        with contextlib.redirect_stderr(caught):
            settings = tyro.cli(
                cls, args=args, prog=prog, description=description, config=(tyro.conf.FlagConversionOff,), **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        message = _first_paragraph(caught.getvalue())
        for word in sys.argv[1:] if args is None else args:  # which the box folds
            if value := word.rpartition("=")[2]:
                message = value.join(re.split(" ?".join(map(re.escape, value)), message))
        raise UsageError(message) from None
    return validate(settings)


def _first_paragraph(box: str) -> str:
    """The first paragraph of one of tyro's error boxes, and the flag it suggests."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    if len(lines) > 1 and set(lines[1]) == {"-"}:  # where the terminal is not UTF-8 the title is a line of its own
        del lines[1]
    paragraphs = re.split(r"\s[─-]{8,}", " ".join(lines[1:]))
    message = paragraphs[0].strip().rstrip(".")
    if guess := re.search(r"erhaps you meant.*?(--[\w.]+)", " ".join(paragraphs[1:])):
        message += f" (did you mean {guess.group(1)}?)"
    return message or box.strip()


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn `UsageError` into `fastcr.<command>: error: <message>` on stderr and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    if "fastcr" in Path(sys.argv[0]).parts[-2:]:  # in a process of its own
        gc.freeze()  # the last search for garbage took a second
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed; what is left in the buffer would be an error at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise SystemExit(128 + signal.SIGPIPE) from None
    except (UsageError, OSError, RuntimeError) as error:  # OSError: a full disk, a folder taken away
        said = str(error)
        if isinstance(error, RuntimeError):  # a loader's process that was killed, for lack of memory in most cases
            if not said.startswith("DataLoader worker"):
                raise
            said = f"{one_line(error)} (fewer --data.workers need less memory)"
        # names of files may hold anything: what is not printable is shown as Python writes it
        message = "".join(each if each.isprintable() else repr(each)[1:-1] for each in said)
        program = called(command).removeprefix("python ").removeprefix("-m ")
        print(f"{program}: error: {message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def split_preset(args: Sequence[str]) -> tuple[list[str], Config]:
    """The arguments after the preset that the first one may name, and its settings (default: `synthetic`)."""
    named = args[:1] if args and not args[0].startswith("-") else []
    return list(args[len(named) :]), preset(*named or ["synthetic"])


def read_command_line(args: Sequence[str]) -> tuple[Config, Path | None]:
    """`[PRESET | --config FILE | --resume RUN] [--section.field value ...]` to settings and the run to resume.

    `PRESET --run.dir RUN --resume auto` resumes RUN if it has saved anything, and begins it if not.
    """
    args, resume, file = _without_resume([arg for arg in args if arg != "--plan"])
    if resume:
        default = load_config(resume / "config.yaml")
    elif file:
        default = load_config(file / "config.yaml" if file.is_dir() else file)  # of a run, not to be written into again
        default = dataclasses.replace(default, run=dataclasses.replace(default.run, dir=None))
    else:
        if "-h" in args or "--help" in args:
            print(short_help(args))
            raise SystemExit(0)
        args, default = split_preset(args)
    presets = "\n".join(f"  {name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
    what = f"Train an image encoder and its attention on unlabelled images.\n\nPresets:\n{presets}"
    prog = f"{called('train')} [PRESET | --config FILE | --resume RUN]"
    args = ["--help" if arg == "--help-all" else arg for arg in args]
    config = parse(Config, args, default=default, prog=prog, description=what)
    if not resume:
        if config.model.weights != default.model.weights:
            said = _as_weights_say(default, Path(config.model.weights))
            config = parse(Config, args, default=said, prog=prog, description=what)  # what is given comes first
        elif config.model.backbone != default.model.backbone and config.model.weights != "none":
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, weights="imagenet"))
        optim, tuned = config.optim, re.match(VIT, config.model.backbone) and config.model.weights != "none"
        if tuned and optim.optimizer == "adamw" and optim.backbone_lr is None:
            config = dataclasses.replace(config, optim=dataclasses.replace(optim, backbone_lr=optim.lr / 10))
        return config, None
    if (config.run.seed, config.optim.batch_size) != (default.run.seed, default.optim.batch_size):
        raise UsageError("--run.seed and --optim.batch_size of a run cannot change: they order its images")
    if (config.optim.backbone_lr == 0) != (default.optim.backbone_lr == 0):
        raise UsageError("--optim.backbone_lr 0 of a run cannot change: one backbone serves as query and key encoder")
    return config, resume


def short_help(args: Sequence[str]) -> str:
    """The settings that people change, on one screen, as the preset has them that `args` name, else as `folder` has."""
    config = preset(args[0] if args and not args[0].startswith("-") else "folder")
    lines = [f"usage: {called('train')} [PRESET | --config FILE | --resume RUN] [--section.field value ...]", ""]
    for name, (section, key, what) in ((f"--{each}", (*each.split("."), what)) for each, what in BASICS.items()):
        value = getattr(getattr(config, section), key)
        lines.append(f"  {name:<21} {what}{'' if value is None else f' ({value})'}")
    lines += ["", f"In brackets: what {config.preset} has. Presets: {', '.join(PRESETS)} (default: synthetic)."]
    lines += ["--help-all explains every setting; --plan says what the run would take and does not begin it;"]
    return "\n".join([*lines, "--config FILE begins with the settings of a run, its config.yaml."])


def _as_weights_say(config: Config, weights: Path) -> Config:
    """The settings with the backbone, and for weights from elsewhere the image size, that these weights have."""
    if not weights.exists():
        return config
    from fastcr.runs.checkpoint import facts_of  # imports torch, which help and mistakes do without

    facts = facts_of(weights)
    named = {key: facts[key] for key in ("backbone", "last_stage") if isinstance(facts.get(key), str)}
    data = dataclasses.replace(config.data, image_size=facts.get("size", config.data.image_size))
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **named), data=data)


def _without_resume(args: Sequence[str]) -> tuple[list[str], Path | None, Path | None]:
    """The arguments without `--resume` and `--config`, the folder of the run to resume, and the file of settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--run.dir", dest="folder")
    try:
        named, others = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        what = "a run folder" if error.argument_name == "--resume" else "a value"
        raise UsageError(f"{error.argument_name} needs {what}") from None
    if named.config and (named.resume or (others and not others[0].startswith("-"))):
        raise UsageError("--config brings all settings: it goes without a preset and without --resume")
    if named.folder is not None:
        others += ["--run.dir", named.folder]
    if named.resume == "auto":
        if named.folder is None:
            raise UsageError("--resume auto needs --run.dir, the folder to look for the run in")
        from fastcr.runs.checkpoint import saves_of  # imports torch, which help and mistakes do without

        if not saves_of(Path(named.folder)):
            return others, None, named.config
        if others and not others[0].startswith("-"):
            del others[0]  # the preset: config.yaml has what came of it
        return others, Path(named.folder), None
    if named.resume is not None and not Path(named.resume).is_dir():
        raise UsageError(f"no run folder {named.resume}")
    return others, Path(named.resume) if named.resume else None, named.config


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML, its paths so that they hold from any working folder."""

    def plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: os.path.abspath(value) if isinstance(value, Path) else value for key, value in items}

    path.write_text(yaml.safe_dump(dataclasses.asdict(config, dict_factory=plain), sort_keys=False))


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote. `UsageError` if it is missing or holds an unknown setting or value."""
    try:
        sections = yaml.safe_load(path.read_text())
        preset = sections.pop("preset", Config.preset)
        settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        # before a nest of lists is written out
        numbers = {key: value for key, value in settings.items() if isinstance(value, list)}
        if not isinstance(preset, str) or any(isinstance(value, dict | set) for value in settings.values()):
            raise TypeError
        if not all(isinstance(each, int | float) for value in numbers.values() for each in value):
            raise TypeError
        if settings.get("run.track") == "none":  # of an earlier version, which could log elsewhere
            del settings["run.track"]
    except FileNotFoundError:
        begun = f"{path.parent} is not a run folder: it has no {path.name}"
        raise UsageError(begun if path.name == "config.yaml" else f"no file {path}") from None
    except (yaml.YAMLError, AttributeError, TypeError, OSError, ValueError, RecursionError):
        raise UsageError(f"{path} is broken: it does not hold sections of settings") from None
    sections = {name: vars(keys) for name, keys in vars(Config()).items() if name != "preset"}
    usual = {f"{name}.{key}": value for name, keys in sections.items() for key, value in keys.items()}
    if unknown := settings.keys() - usual.keys():
        raise UsageError(f"{path} was made by another version of fastcr: unknown settings {', '.join(sorted(unknown))}")
    # older versions of tyro cannot read None where there could be several numbers
    given = {name: value for name, value in settings.items() if value is not None or usual[name] is not None}
    flags = [f"--{name}={value}" for name, value in given.items() if name not in numbers]
    flags += [word for name, values in numbers.items() for word in (f"--{name}", *map(str, values))]
    try:
        # through the command line's own checks: a file edited by hand gets the same messages
        return dataclasses.replace(parse(Config, flags, prog="config.yaml", description=None), preset=preset)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
