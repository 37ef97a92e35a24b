"""``hybridprune``: the entry point of all commands. Light: a command is imported when it is named."""

from __future__ import annotations

import importlib
import signal
import sys
from collections.abc import Sequence

from hybridprune_megatron.checks import closest, shown
from hybridprune_megatron.config.one_line import USER_ERROR

#: Commands with their modules and what they do, in the order of a first use.
COMMANDS = {
    "shards": ("shards", "makes a data set from a folder of videos and a file of conversations"),
    "import": ("import_hf", "makes a Hugging Face checkpoint one that training starts from"),
    "plan": ("plan", "finds the budget that reaches a speedup or fits a memory"),
    "finetune": ("finetune", "finetunes a model under token reduction"),
    "plot": ("plot", "draws what runs have logged: loss, validation, tokens per second"),
    "evaluate": ("evaluate", "how good a checkpoint's or an export's answers are, over budgets"),
    "predict": ("predict", "answers of a checkpoint or an export about many videos, in a file"),
    "analyze": ("analyze", "looks into a checkpoint: its scores, what it keeps, and what a drop loses"),
    "compare": ("compare", "puts two analyses on one page: what differs, and their figures side by side"),
    "solve": ("solve", "finds the share of visual tokens per layer that costs the answers least"),
    "export": ("export_hf", "writes a checkpoint as a Hugging Face folder that runs without this project"),
    "ask": ("ask", "asks an exported model a question about a video"),
    "benchmark": ("benchmark", "times the language model with and without reduction"),
    "features": ("features", "runs a frozen vision tower over a data set once, and stores its features"),
}


def usage() -> str:
    """The commands, a line each."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: hybridprune <command> [key=value ...] [options]",
            "",
            *lines,
            "",
            "hybridprune <command> --help says what a command takes. Values of the configuration are Hydra overrides,",
            "e.g. hybridprune plan experiment=nemotron_nano_12b_v2_vl target.speedup=4",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Runs the command that the first argument names with the others; a wrong name is one line and code 2."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return
    name, *arguments = argv
    if name not in COMMANDS:
        near = closest(name, COMMANDS)
        hint = f"did you mean {near}?" if near else "hybridprune --help explains them"
        allowed = f"allowed are {', '.join(COMMANDS)}"
        print(f"hybridprune: {shown(name)}: unknown command; {allowed}; {hint}", file=sys.stderr)
        sys.exit(USER_ERROR)
    importlib.import_module(f"hybridprune_megatron.commands.{COMMANDS[name][0]}").main(arguments)


def run(argv: Sequence[str] | None = None) -> None:
    """The program.

    Args:
        argv: a command and its arguments; None: those of the process.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("plan", "-h", "--help", "help"):
        # `hybridprune plan ... | head` ends quietly when head has read enough. What writes files ends in order.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    main(argv)


# Megatron's checkpoint writer and the data workers start processes that import this file.
if __name__ == "__main__":
    run()
