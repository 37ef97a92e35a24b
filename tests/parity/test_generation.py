"""Greedy text from our exported code and from transformers on the same weights, token for token."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.parity.ours import config_of, model_of
from tests.parity.twins import STRUCTURES, VOCAB, write_language_twin
from tests.worlds import run_world

NEW_TOKENS = 64
PROMPT = 19


def _prompt() -> torch.Tensor:
    return torch.randint(0, VOCAB, (1, PROMPT), generator=torch.Generator().manual_seed(5))


def _ours(folder: Path) -> list[list[int]]:
    """Generated tokens with a cache and without."""
    from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
    from hybridprune_megatron.export.write import hf_config, hf_weights

    cfg = config_of(folder)
    exported = HybridPruneForCausalLM(hf_config(cfg)).eval()
    exported.load_state_dict(hf_weights(model_of(cfg), cfg))
    found = []
    for use_cache in (True, False):
        out = exported.generate(
            input_ids=_prompt(),
            use_cache=use_cache,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
        )
        found.append(out[0, PROMPT:].tolist())
    return found


@pytest.mark.parametrize("structure", STRUCTURES)
def test_sixty_four_tokens(tmp_path: Path, structure: str) -> None:
    theirs = write_language_twin(tmp_path / "hf", structure)
    wanted = theirs.generate(_prompt(), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    expected = wanted[0, PROMPT:].tolist()
    assert len(expected) == NEW_TOKENS
    assert len(set(expected)) > 3, "a text that repeats one token would compare little"
    cached, recomputed = run_world(1, _ours, tmp_path / "hf")[0]
    assert cached == expected
    assert recomputed == expected
