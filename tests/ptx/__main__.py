"""`python -m tests.ptx [NAME ...]`: execute compiled kernels on the CPU and print what is wrong with them."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

from tests.ptx import cases
from tests.ptx.run import executed

LINE = "{:<38} {:<6} {:<28} {:>12}  {:<8} {}"


def table_of(name: str, target: int) -> bool:
    """Execute one case, print a line for each of its kernels and each finding, and tell whether nothing is wrong."""
    wrong = ""
    with executed(target) as launches:
        try:
            cases.check(name)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    for kernel in dict.fromkeys(launch.kernel for launch in launches):
        mine = [launch for launch in launches if launch.kernel == kernel]
        count = sum(launch.executed.total() for launch in mine)
        findings = sum((launch.findings for launch in mine), Counter[str]())
        result = "wrong" if wrong else "right"
        print(LINE.format(name, f"sm_{target}", kernel, f"{count:,}", result, len(findings) or "none"))
        for finding, times in findings.items():
            print(f"    {times} x {finding}")
    if wrong:
        print(f"{name}, sm_{target}: {wrong}")
    sys.stdout.flush()
    return not wrong and not any(launch.findings for launch in launches)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where nothing is wrong, 1 where anything is."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx",
        description="Executes the compiled kernels of the cases in tests/ptx/cases.py on the CPU and prints for each "
        "whether its result is right and what was found: races, missing fences, accesses out of bounds.",
        epilog="The exit status is 1 if anything is wrong. No GPU is needed. TRITON_INTERPRET must not be 1. "
        f"The cases: {'; '.join(cases.CASES)}.",
    )
    parser.add_argument("name", nargs="*", help="a case, or the beginning of the names of several; none: all cases")
    parser.add_argument("--target", type=int, nargs="+", choices=(80, 90), default=(80, 90), help="compute capability")
    options = parser.parse_args(arguments)
    names = [case for case in cases.CASES if not options.name or case.startswith(tuple(options.name))]
    if unknown := [name for name in options.name if not any(case.startswith(name) for case in names)]:
        parser.error(f"no case begins with {unknown[0]!r}; --help names them")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it")
    print(LINE.format("case", "target", "kernel", "instructions", "result", "findings"))
    right = [table_of(name, target) for name in names for target in options.target]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
