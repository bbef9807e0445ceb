"""HTML pages that need nothing else: the templates filled in, every name in them escaped."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fastcr.errors import UsageError

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # no script is run, nothing is fetched
# what no page may hold: control characters, and halves of characters from file names that are not UTF-8
UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def render(template: str, helpers: dict[str, Any], **values: Any) -> str:
    """The page that `template` makes of `values`; its macros have `helpers` at hand."""
    environment = Environment(
        loader=PackageLoader("fastcr", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= helpers
    return UNPRINTABLE.sub("\ufffd", environment.get_template(template).render(policy=POLICY, **values))


def check_out(out: Path, generator: str) -> None:
    """`UsageError` where no file can be at `out`, or one is there that does not begin with this `generator` in it."""
    if not out.parent.is_dir():
        raise UsageError(f"no folder {out.parent} to write {out.name} into")
    if out.exists() or out.is_symlink():
        if not out.is_file():
            raise UsageError(f"{out} is no file")
        with out.open("rb") as file:
            if generator.encode() not in file.read(1000):
                command = re.findall(r"fastcr\.(\w+)", generator)[0]
                raise UsageError(f"{out} is not a {command} of fastcr, so it is left as it is: name another --out")
