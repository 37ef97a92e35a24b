"""An exported folder read back by this package's own code; none of the folder's code runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging

from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM


def load_export(folder: Path) -> HybridPruneForCausalLM:
    """The model of a folder that ``hybridprune export`` wrote, in its own dtype, in eval mode, nothing reduced.

    Raises:
        ValueError: its files cannot be read, or its weights are of another model. One line.
    """
    try:
        with _quietly():
            model, info = HybridPruneForCausalLM.from_pretrained(
                str(folder),
                reduction=None,
                dtype="auto",
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (KeyboardInterrupt, SystemExit):
        raise
    # A broken file ends in errors of every kind, down to panics of the libraries below, which are not an Exception.
    except BaseException as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{folder} cannot be read as an export ({reason:.300}): write it again") from None
    wrong = sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]))
    if wrong:
        names = ", ".join(wrong[:5])
        raise ValueError(f"{folder}: weights do not fit its configuration ({len(wrong)}: {names:.300}): write it again")
    return model.eval()


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' progress bar and its table of weights that do not fit, of which we say so in a line."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
