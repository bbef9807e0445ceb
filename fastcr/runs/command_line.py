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


def print_any_name() -> None:
    """Let stdout and stderr take names of files that are no UTF-8, as they are."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="surrogateescape")


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
        raise UsageError(_first_paragraph(caught.getvalue())) from None
    return validate(at_home(settings))


def at_home(settings: C) -> C:
    """The settings with the user's home for the `~` of paths: shells leave that of `--flag=~/folder` as it is."""
    changed: dict[str, Any] = {}
    for each in dataclasses.fields(settings):  # type: ignore[arg-type]
        value = getattr(settings, each.name)
        if dataclasses.is_dataclass(value):
            changed[each.name] = at_home(value)
        elif isinstance(value, str | Path) and str(value).startswith("~/"):
            changed[each.name] = type(value)(os.path.expanduser(value))
    return dataclasses.replace(settings, **changed)  # type: ignore[type-var]


def _first_paragraph(box: str) -> str:
    """The first paragraph of one of tyro's error boxes, and the flag it suggests."""
    lines = [line.strip("│╭╮╰╯ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    if len(lines) > 1 and set(lines[1]) == {"-"}:  # where the terminal is not UTF-8 the title is a line of its own
        del lines[1]
    del lines[:1]
    rules = [i for i, line in enumerate(lines) if line.startswith(("──", "---"))] or [len(lines)]
    message = " ".join(lines[: rules[0]]).strip().rstrip(".")
    after = " ".join(lines[rules[0] :])
    if "erhaps you meant" in after and (guess := re.search(r"--[\w.]+", after)):
        message += f" (did you mean {guess.group()}?)"
    return message or box.strip()


def spare_imports() -> None:
    """Take all there is out of the search for garbage, in a command's own process: the last one took a second."""
    if "fastcr" in Path(sys.argv[0]).parts[-2:]:
        gc.freeze()


@contextlib.contextmanager
def one_line_errors(command: str) -> Iterator[None]:
    """Turn `UsageError` into `fastcr.<command>: error: <message>` on stderr and exit status 2."""
    print_any_name()
    spare_imports()
    try:
        yield
    except BrokenPipeError:  # nobody reads what is printed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what is left in the buffer would be an error at the end
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


def read_command_line(args: Sequence[str]) -> tuple[Config, Path | None]:
    """`[PRESET | --resume RUN] [--section.field value ...]` to settings and the run to resume.

    `PRESET --run.dir RUN --resume auto` resumes RUN if it has saved anything, and begins it if not.
    """
    args, resume = _without_resume(list(args))
    if resume:
        default = load_config(resume / "config.yaml")
    else:
        default = preset(args.pop(0) if args and not args[0].startswith("-") else "synthetic")
    presets = "\n".join(f"  {name}: {(make.__doc__ or '').splitlines()[0]}" for name, make in PRESETS.items())
    config = parse(
        Config,
        args,
        default=default,
        prog=f"{called('train')} [PRESET | --resume RUN]",
        description=f"Train an image encoder and its attention on unlabelled images.\n\nPresets:\n{presets}",
    )
    if not resume:
        config = _with_own_weights(config, default)
    if resume and (config.run.seed, config.optim.batch_size) != (default.run.seed, default.optim.batch_size):
        raise UsageError("--run.seed and --optim.batch_size of a run cannot change: they order its images")
    if resume and (config.optim.backbone_lr == 0) != (default.optim.backbone_lr == 0):
        raise UsageError("--optim.backbone_lr 0 of a run cannot change: one backbone serves as query and key encoder")
    return config, resume


def _with_own_weights(config: Config, default: Config) -> Config:
    """The settings, another backbone than the preset's with its own weights, not with the file of the preset's.

    Weights that fastcr wrote say themselves of which encoder they are.
    """
    model, preset_s = config.model, default.model
    facts = {}
    if model.weights != preset_s.weights and Path(model.weights).exists():
        from fastcr.runs.checkpoint import facts_of  # imports torch, which help and mistakes do without

        facts = facts_of(Path(model.weights))
    if model.backbone == preset_s.backbone and isinstance(facts.get("backbone"), str):
        model = dataclasses.replace(
            model, backbone=facts["backbone"], last_stage=facts.get("last_stage", model.last_stage)
        )
        return validate(dataclasses.replace(config, model=model))
    other = model.backbone != preset_s.backbone and model.weights == preset_s.weights
    if other and model.weights not in ("imagenet", "none"):
        return dataclasses.replace(config, model=dataclasses.replace(model, weights="imagenet"))
    return config


def _without_resume(args: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--resume`, and the folder of the run to resume, if there is one."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--resume")
    parser.add_argument("--run.dir", dest="folder")
    try:
        named, others = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise UsageError(f"{error.argument_name} needs a run folder") from None
    if named.folder is not None:
        others += ["--run.dir", named.folder]
    if named.resume is None:
        return others, None
    if named.resume != "auto":
        resume = Path(named.resume)
        if resume.name == "resume.pt" and not resume.is_dir():  # the file in the folder that is meant
            resume = resume.parent
        if not resume.is_dir():
            raise UsageError(f"no run folder {resume}")
        return others, resume
    if named.folder is None:
        raise UsageError("--resume auto needs --run.dir, the folder to look for the run in")
    from fastcr.runs.checkpoint import has_resume  # imports torch, which help and mistakes do without

    resume = Path(named.folder)
    if not has_resume(resume / "resume.pt"):
        return others, None
    return others[bool(others and not others[0].startswith("-")) :], resume  # config.yaml has what came of the preset


def save_config(config: Config, path: Path) -> None:
    """Write `config` as YAML, its paths so that they hold from any working folder."""
    text = yaml.safe_dump(dataclasses.asdict(config, dict_factory=_plain), sort_keys=False)
    path.write_text(text)


def _plain(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: os.path.abspath(value) if isinstance(value, Path) else value for key, value in items}


def load_config(path: Path) -> Config:
    """Read what `save_config` wrote. `UsageError` if it is missing or holds an unknown setting or value."""
    try:
        sections = yaml.safe_load(path.read_text())
        preset = sections.pop("preset", Config.preset)
        settings = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
        # before a nest of lists is written out
        if not isinstance(preset, str) or any(isinstance(value, list | dict | set) for value in settings.values()):
            raise TypeError
    except FileNotFoundError:
        raise UsageError(f"{path.parent} is not a run folder: it has no {path.name}") from None
    except (yaml.YAMLError, AttributeError, TypeError, OSError, ValueError, RecursionError):
        raise UsageError(f"{path} is broken: it does not hold sections of settings") from None
    known = {f"{name}.{key}" for name, keys in vars(Config()).items() if name != "preset" for key in vars(keys)}
    if unknown := settings.keys() - known:
        raise UsageError(f"{path} was made by another version of fastcr: unknown settings {', '.join(sorted(unknown))}")
    flags = [f"--{name}={value}" for name, value in settings.items()]
    try:
        # through the command line's own checks: a file edited by hand gets the same messages
        return dataclasses.replace(parse(Config, flags, prog="config.yaml", description=None), preset=preset)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
