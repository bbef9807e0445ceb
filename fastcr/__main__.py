"""`fastcr COMMAND ...`, the same as `python -m fastcr.COMMAND ...`; `fastcr --help` lists the commands."""

from __future__ import annotations

import difflib
import gc
import sys
from collections.abc import Sequence
from importlib import import_module

# here rather than in the commands, so that nothing heavy is imported to list them
COMMANDS = {
    "train": "train an encoder and its attention on unlabelled images",
    "evaluate": "measure an encoder: retrieval, kNN, linear probes, where the attention lies",
    "embed": "write the embeddings of a folder of images to files",
    "search": "find the images of an embedded folder that are most similar to others",
    "browse": "search an embedded folder on a local page",
    "visualize": "draw the attention over images",
    "report": "make an HTML page of a run",
    "export": "write an encoder as safetensors, torch.export, ONNX or for the Hugging Face Hub",
    "trace": "profile a training step, phase by phase and kernel by kernel",
    "folders": "say what a folder of images holds, and which are broken",
}
HELP = "\n".join(
    [
        "usage: fastcr COMMAND [ARGUMENTS]",
        "",
        *(f"  {command:<10} {what}" for command, what in COMMANDS.items()),
        "",
        "fastcr COMMAND --help lists a command's arguments, fastcr --version prints the version.",
    ]
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command that the first argument names."""
    command, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
    if command in ("-h", "--help"):
        print(HELP)
    elif command == "--version":
        import fastcr

        print(fastcr.__version__)
    elif command in COMMANDS:
        from fastcr.arguments import check_arguments
        from fastcr.runs.command_line import one_line_errors

        with one_line_errors(command):
            check_arguments(command, rest)
            gc.disable()  # what the libraries make stays: looking through it takes half a second
            module = import_module(f"fastcr.{command}")
            gc.enable()
        module.main(rest)
    else:
        guess = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f"did you mean {guess[0]}?" if guess else "fastcr --help lists the commands"
        print(f"fastcr: error: no command {command!r} ({hint})", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
