"""Broken config.yaml files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from fastcr.config import Config
from fastcr.presets import PRESETS
from fastcr.runs.command_line import load_config, save_config
from fastcr.runs.validate import validate
from tests.fuzz import damage
from tests.fuzz.damage import ODD_NUMBERS, ODD_VALUES, ODD_WORDS
from tests.fuzz.properties import REFUSED, attempt, fuzzed, reading

ODD_YAML = ["!!python/object/apply:os.system ['true']", "&a [*a]", "*nobody", "{" * 500, "[" * 500, "- - -",
            "2020-13-45", "!!int x", "!!float x", "0b", "!!binary x", "!!set {a}", "1:99:99", "? x", "<<: 3",
            "|\n    x\n    y", "@", '"\\0"', '"\\uD800"', "{run: {dir: x}}", "2020-01-01", "0o9", "!!timestamp x",
            "=", "!!omap [1]", "  cam_sign: score", "  batchnorm: true"]  # fmt: skip
LAUGHS = "run:\n  a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(  # each key holds nine times the one before
    f"  {new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcde", "bcdef", strict=True)
)
CONFIG_DAMAGE = damage.text([*ODD_YAML, *ODD_YAML, *ODD_NUMBERS, *ODD_WORDS])
# the text of a whole other file
OTHER_CONFIG = st.one_of(
    st.sampled_from([LAUGHS, *(yaml.dump(value) for value in ODD_VALUES)]), damage.VALUES.map(yaml.dump)
).map(str.encode)


def from_anywhere(settings: Any) -> Any:
    """Settings with absolute paths."""
    values = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            values[name] = from_anywhere(value)
        elif isinstance(value, Path):
            values[name] = Path(os.path.abspath(value))
    return dataclasses.replace(settings, **values)


def kept(config: Config, folder: Path) -> bool:
    """Whether `config` is the same after a resume has read it back, with the paths that it names from here."""
    file = folder / "kept" / "config.yaml"
    file.parent.mkdir(exist_ok=True)
    save_config(config, file)
    return load_config(file) == from_anywhere(config)


@fuzzed(
    sample=15,
    count=1000,
    preset=st.sampled_from(list(PRESETS)),
    spoil=st.one_of(CONFIG_DAMAGE, CONFIG_DAMAGE, CONFIG_DAMAGE, OTHER_CONFIG),
)
def test_config_yaml(folder: Path, preset: str, spoil: damage.Bytes | damage.Lines | bytes) -> None:
    file = folder / "config.yaml"
    save_config(PRESETS[preset](), file)
    file.write_bytes(spoil if isinstance(spoil, bytes) else spoil(file.read_bytes()))
    config = reading(lambda: load_config(file), folder)
    if config is not REFUSED:
        assert isinstance(config.preset, str), "the preset is no name"
        if attempt(lambda: validate(config)) is not REFUSED:
            assert kept(config, folder), "config.yaml does not bring it back"
