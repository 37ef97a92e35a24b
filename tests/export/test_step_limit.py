"""Both conventions of Mamba's step size: as it comes (megatron, the original code) and clamped (transformers)."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, NemotronHForCausalLM

from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
from tests.export.conftest import row
from tests.export.naive import embedded, entering_layers, naive_logits
from tests.parity.twins import STRUCTURES, language_config

STEPS = 12


@pytest.fixture(scope="module")
def theirs() -> NemotronHForCausalLM:
    """A text-only twin in transformers with many steps below 1e-3."""
    torch.manual_seed(0)
    model = NemotronHForCausalLM(language_config("12b")).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("dt_bias"):
                value.copy_(torch.linspace(-9, -5, len(value)))
            elif name.endswith(".D"):
                value.zero_()
            elif name.endswith(("norm.weight", "norm_f.weight", "conv1d.bias")):
                value.add_(torch.randn_like(value) * 0.1)
    return model


def ours_of(theirs: NemotronHForCausalLM, limit: list) -> HybridPruneForCausalLM:
    """The same weights in our code."""
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    more = ("mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "conv_kernel", "chunk_size")
    values = {name: getattr(theirs.config, name) for name in (*same, *more, "layer_norm_epsilon")}
    pattern = STRUCTURES["12b"]["hybrid_override_pattern"]
    ours = HybridPruneForCausalLM(HybridPruneConfig(hybrid_override_pattern=pattern, time_step_limit=limit, **values))
    state = {f"language_model.{name}".replace(".model.", ".backbone."): v for name, v in theirs.state_dict().items()}
    ours.load_state_dict(state)
    return ours.eval()


@pytest.mark.parametrize("limit", [[0.0, "inf"], [1e-3, "inf"]], ids=["as it comes", "clamped"])
def test_logits_and_answers_are_those_of_transformers(theirs, limit: list) -> None:
    for module in theirs.modules():
        if hasattr(module, "time_step_limit"):
            # transformers takes time_step_min from the configuration here.
            assert module.time_step_limit[0] in (1e-3, 0.0)
            module.time_step_limit = tuple(float(bound) for bound in limit)
    ours = ours_of(theirs, limit)
    other = ours_of(theirs, [1e-3 - limit[0], "inf"])
    ids = torch.randint(0, 1024, (2, 45), generator=torch.Generator().manual_seed(1))
    settings = {"do_sample": False, "max_new_tokens": STEPS, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        wanted = theirs(ids).logits
        assert (ours(ids).logits - wanted).abs().max() < 2e-4
        assert (other(ids).logits - wanted).abs().max() > 1e-2, "the twin cannot tell the conventions apart"
        # Without caches: transformers' own decoding step forgets the clamp.
        wanted = theirs.generate(ids, **settings, use_cache=False)
        assert torch.equal(ours.generate(ids, **settings), wanted)


@pytest.mark.parametrize("limit", [[0.0, "inf"], [0.6, "inf"], [0.3, 0.9]])
def test_a_reduced_video_prompt_equals_the_written_out_formula(world, inputs, limit: list, tmp_path) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.folder, trust_remote_code=True, time_step_limit=limit).eval()
    assert model.config.time_step_limit == limit
    single = row(inputs, 1)
    out = model.generate(
        **single,
        do_sample=False,
        max_new_tokens=4,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        output_reduction=True,
    )
    ids = out.sequences[0]
    kept = [layer[0] for layer in out.past_key_values.reduction.positions]
    wanted = naive_logits(model, embedded(model, single, ids), entering_layers(model, ids, kept))
    assert (torch.cat(out.logits) - wanted[-5:-1]).abs().max() < 1e-4
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["time_step_limit"] == limit


@pytest.mark.parametrize("limit", [[0.1], [0.5, 0.1], [-1, 1], "none", None])
def test_other_limits_are_refused_in_one_line(limit) -> None:
    with pytest.raises(ValueError, match="time_step_limit=") as error:
        HybridPruneConfig(time_step_limit=limit)
    assert "\n" not in str(error.value)
