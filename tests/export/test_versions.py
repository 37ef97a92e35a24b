"""The versions of transformers that exports run under: the name of the caches, and the range in ``config.json``."""

from __future__ import annotations

import copy
import json
import os
import shutil
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from hybridprune_megatron.export.cache_name import CACHE_NAME
from hybridprune_megatron.export.configuration_hybridprune import HybridPruneConfig
from hybridprune_megatron.export.modeling_hybridprune import HybridPruneForCausalLM
from hybridprune_megatron.export.transformers_range import TRANSFORMERS_RANGE
from tests.export.conftest import row

SETTINGS = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "return_dict_in_generate": True}
# What runs these tests under another version than the installed one says which.
WANTED = os.environ.get("HYBRIDPRUNE_TRANSFORMERS", transformers.__version__)


def test_the_version_that_was_meant_runs_and_is_supported() -> None:
    assert transformers.__version__ == WANTED
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HybridPruneConfig().transformers_range == TRANSFORMERS_RANGE
    old = tuple(int(part) for part in WANTED.split(".")[:2]) < (5, 24)
    assert (CACHE_NAME == "past_key_values") is old


def test_outputs_have_the_caches_under_this_versions_name_and_the_old_one(world, inputs) -> None:
    with torch.no_grad():
        out = world.hf(**inputs, use_cache=True)
    generated = world.hf.generate(**inputs, **SETTINGS)
    assert list(out) == ["logits", CACHE_NAME]
    for output in (out, generated):
        assert type(output[CACHE_NAME]).__name__ == "HybridCache"
        assert getattr(output, CACHE_NAME) is output.past_key_values is output[CACHE_NAME]
    logits, cache = world.hf(**inputs, use_cache=True, return_dict=False)
    assert logits.shape == out.logits.shape
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_caches_are_taken_under_both_names(world, inputs, name: str) -> None:
    single = row(inputs, 0)
    first = world.hf.generate(**single, **SETTINGS)
    asked = world.processor.next_turn(first.sequences, "And?")
    whole = {**single, **asked}
    wanted = world.hf.generate(**whole, **SETTINGS)

    def given() -> dict:
        return {name: copy.deepcopy(first[CACHE_NAME])}

    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert torch.equal(world.hf.generate(**asked, **given(), **SETTINGS).sequences, wanted.sequences)
    new = asked["input_ids"][:, first[CACHE_NAME].get_seq_length() :]
    with torch.no_grad():
        alone = world.hf(input_ids=new, **given())
        together = world.hf(**whole, logits_to_keep=new.shape[1])
    assert (alone.logits - together.logits).abs().max() < 1e-4
    prepared = world.hf.prepare_inputs_for_generation(asked["input_ids"], new.shape[1], **given())
    assert torch.equal(prepared["input_ids"], new)
    assert prepared[CACHE_NAME].get_seq_length() == first[CACHE_NAME].get_seq_length()


def test_two_caches_and_caches_of_another_kind_are_refused(world, inputs) -> None:
    single = row(inputs, 0)
    with torch.no_grad():
        cache = world.hf(**single, use_cache=True)[CACHE_NAME]
    for given, text in (
        ({"past_key_values": cache, "cache": copy.deepcopy(cache)}, "two names of one argument"),
        ({"cache": transformers.DynamicCache()}, "past_key_values of type DynamicCache"),
        ({"past_key_values": ((),)}, "past_key_values of type tuple"),
    ):
        for call in (world.hf, world.hf.generate, world.hf.prepare_inputs_for_generation):
            with pytest.raises(ValueError, match=text) as error:
                call(input_ids=single["input_ids"], **given)
            assert "\n" not in str(error.value)


@pytest.mark.parametrize("pattern", ["M-M", "*-*", "M"])
def test_a_chat_goes_on_whatever_the_layers_are(world, pattern: str) -> None:
    """transformers 5.24 passes caches of "linear" layers alone every column again."""
    torch.manual_seed(0)
    changed = {"hybrid_override_pattern": pattern, "vision": None, "reduction": None, "image_token_id": None}
    model = HybridPruneForCausalLM(HybridPruneConfig.from_dict({**world.hf.config.to_dict(), **changed})).eval()
    ids = torch.randint(5, 200, (2, 11))
    first = model.generate(ids, **SETTINGS)
    asked = torch.cat([first.sequences, torch.randint(5, 200, (2, 3))], 1)
    wanted = model.generate(asked, **SETTINGS).sequences
    assert torch.equal(model.generate(asked, past_key_values=first[CACHE_NAME], **SETTINGS).sequences, wanted)


@pytest.mark.parametrize("version", ["4.57.1", "5.0.0", "5.22.3", "5.23.0.dev0"])
def test_older_versions_are_refused_in_one_line(world, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(
        ValueError, match=f"transformers {version} is installed .* pip install 'transformers>="
    ) as error:
        AutoConfig.from_pretrained(world.folder, trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_they_are_refused_before_anything_is_asked_of_them(world, monkeypatch, tmp_path: Path) -> None:
    folder = shutil.copytree(world.folder, tmp_path / "never loaded before")
    monkeypatch.setattr(transformers, "__version__", "4.50.0")
    monkeypatch.setattr(transformers, "PreTrainedConfig", None)
    with pytest.raises(ValueError, match=r"transformers 4\.50\.0 is installed"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True)


@pytest.mark.parametrize("version", ["5.25.0", "5.25.0.dev0", "6.1"])
def test_newer_versions_get_a_warning(world, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.warns(UserWarning, match=f"transformers {version} is installed") as warned:
        AutoConfig.from_pretrained(world.folder, trust_remote_code=True)
    assert all("\n" not in str(each.message) for each in warned)


@pytest.mark.parametrize("version", ["5.23.0", "5.23.4", "5.24.0", "5.24.1"])
def test_versions_of_the_range_are_taken(world, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(transformers, "__version__", version)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridPruneConfig(transformers_range=TRANSFORMERS_RANGE)


def test_the_range_is_that_of_the_folder(world, tmp_path: Path) -> None:
    before = json.loads((world.folder / "config.json").read_text())
    assert before["transformers_range"] == TRANSFORMERS_RANGE
    assert f"`transformers{TRANSFORMERS_RANGE}`" in (world.folder / "README.md").read_text()
    folder = shutil.copytree(world.folder, tmp_path / "hf")
    for given, text in ((">=99", "under >=99"), ("new", "'new' in config.json"), (5.23, "5.23 in config.json")):
        (folder / "config.json").write_text(json.dumps({**before, "transformers_range": given}))
        with pytest.raises(ValueError, match=text) as error:
            AutoConfig.from_pretrained(folder, trust_remote_code=True)
        assert "\n" not in str(error.value)
