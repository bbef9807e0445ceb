"""`python -m tests.ptx [NAME ...]`: execute compiled kernels on the CPU and print what is wrong with them."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

from tests.ptx import cases
from tests.ptx.run import Launch, executed

LINE = "{:<34} {:<6} {:<28} {:>12}  {:<8} {}"


def table_of(name: str, target: int) -> bool:
    """Execute one case, print a line for each of its kernels and each finding, and tell whether nothing is wrong."""
    wrong = ""
    with executed(target) as launches:
        try:
            cases.check(name)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    kernels: dict[str, Launch] = {}
    for launch in launches:
        before = kernels.setdefault(launch.kernel, Launch(launch.kernel, Counter(), Counter()))
        before.findings.update(launch.findings)
        before.executed.update(launch.executed)
    result = "wrong" if wrong else "right"
    for each in kernels.values() or [Launch("none", Counter(), Counter())]:
        count = f"{each.executed.total():,}"
        print(LINE.format(name, f"sm_{target}", each.kernel, count, result, len(each.findings) or "none"))
        for finding, times in each.findings.items():
            print(f"    {times} x {finding}")
    if wrong:
        print(f"    {wrong}")
    sys.stdout.flush()
    return not wrong and not any(each.findings for each in kernels.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0 where nothing is wrong, 1 where anything is."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.ptx",
        description="Executes the compiled kernels of the cases in tests/ptx/cases.py on the CPU and prints for each "
        "whether its result is right and what was found: races, missing fences, accesses out of bounds.",
        epilog="The exit status is 1 if anything is wrong. No GPU is needed. TRITON_INTERPRET must not be 1.",
    )
    parser.add_argument("name", nargs="*", help="a case, or the beginning of the names of several; none: all cases")
    parser.add_argument("--target", type=int, nargs="+", choices=(80, 90), default=(80, 90), help="compute capability")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and end")
    options = parser.parse_args(arguments)
    names = [case for case in cases.CASES if not options.name or case.startswith(tuple(options.name))]
    unknown = [name for name in options.name if not any(case.startswith(name) for case in names)]
    if unknown:
        parser.error(f"no case begins with {unknown[0]!r}; --list names them")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 takes the place of Triton's compiler: unset it")
    if options.list:
        print(*names, sep="\n")
        return 0
    print(LINE.format("case", "target", "kernel", "instructions", "result", "findings"))
    right = [table_of(name, target) for name in names for target in options.target]
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
