"""Damage to files of every kind, as hypothesis draws it and makes it smaller: functions from whole bytes to broken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hypothesis import strategies as st

ODD_NUMBERS = ["nan", "inf", "-inf", "-1", "0", "1e400", "9" * 30, "9" * 5000, "1_0", "0x1f", "1e-320", "-0.0", "2.5",
               str(2**63), str(10**9), str(-(2**63) - 1), "١٢"]  # fmt: skip
ODD_WORDS = ["", " ", "None", "null", "True", "[]", "{}", "--", "-", "~", "a\tb", "ä鸟\u202e", "%s {0}", "'\"", "\\",
             "../..", "/dev/null", "x" * 5000, "a\nb", "[bold]x[/]", "\x1b[31m", "\u2028", "\udc80", "\r"]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, -1, 0, 2.5, 1e308, float("nan"), float("inf"), 10**30, 2**63, -(2**40), "", "5", "ä", "\udc80",
    "\ud800", "a\nb", "/etc/passwd", "../x", "a\0b", "x" * 3000, [], {}, [[]], [1, 2], {"mean": {"rank1": None}},
]  # fmt: skip
ODD_BYTES = [b"\xff" * 4, b"\x7f" + b"\xff" * 3, b"\0\0\0\x80", b"\xff" * 8, b"\n"]
SHARE = st.floats(0, 1)
Damage = Callable[[bytes], bytes]


class Bytes(NamedTuple):
    """A bit flipped, or bytes set, zeroed, left out, moved to the end, doubled, added; or the end cut off."""

    edits: Sequence[tuple[str, float, int, bytes]]

    def __call__(self, content: bytes) -> bytes:
        data = bytearray(content)
        for kind, where, size, new in self.edits:
            at = min(where if isinstance(where, int) else int(where * len(data)), len(data))
            part = bytes(data[at : at + size])
            flipped = bytes([part[0] ^ 1 << size % 8]) + part[1:] if part else part
            data[at : at + size] = {"flip": flipped, "set": new, "zero": bytes(len(part)), "double": part * 2,
                                    "add": new + part}.get(kind, b"")  # fmt: skip
            if kind == "move":
                data += part
            elif kind == "cut":
                del data[at:]
        return bytes(data)


class Lines(NamedTuple):
    """Lines doubled, moved, left out or added, words replaced by odd ones."""

    edits: Sequence[tuple[str, float, float, str]]
    errors: str

    def __call__(self, content: bytes) -> bytes:
        lines = content.decode(errors="surrogateescape").split("\n")
        for kind, where, which, word in self.edits:
            at, words = round(where * (len(lines) - 1)), lines[round(where * (len(lines) - 1))].split(" ")
            words[round(which * (len(words) - 1))] = word
            moved = lines.pop(at) if kind in ("move", "remove") and len(lines) > 1 else lines[at]
            if kind in ("move", "double"):
                lines.insert(round(which * len(lines)), moved)
            elif kind in ("add", "replace"):
                lines[at : at + (kind == "replace")] = [word if kind == "add" else " ".join(words)]
        return "\n".join(lines).encode(errors=self.errors)


NO_DAMAGE = st.just(Bytes(()))
KINDS = ["flip", "flip", "flip", "set", "zero", "remove", "move", "double", "add", "cut"]
WHERE = st.one_of(st.integers(0, 600), SHARE)  # headers come first
NEW = st.one_of(st.binary(min_size=1, max_size=300), st.sampled_from(ODD_BYTES))
EDIT = st.tuples(st.sampled_from(KINDS), WHERE, st.integers(1, 300), NEW)
BYTES = st.lists(EDIT, min_size=1, max_size=6).map(Bytes)
# half of the damage goes into the tensors, which are most of a real file
ARCHIVED = st.one_of(BYTES, st.floats(0.125, 0.875).map(lambda where: Bytes([("flip", where, 1, b"")])))
ATOMS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=10))
VALUES = st.one_of(
    st.sampled_from(ODD_VALUES), st.recursive(ATOMS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner))
)


def text(words: Sequence[str]) -> st.SearchStrategy[Damage]:
    """Damage to the lines and words of a text, or to its bytes."""
    kinds = st.sampled_from(["double", "move", "remove", "add", "replace", "replace", "replace"])
    edits = st.lists(st.tuples(kinds, SHARE, SHARE, st.sampled_from(words)), min_size=1, max_size=4)
    lines = st.builds(Lines, edits, st.sampled_from(["surrogateescape"] * 9 + ["backslashreplace"]))
    return st.one_of(BYTES, lines, lines, lines)
