"""A score of somebody else's goes along with the export, in one file."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from transformers import AutoModelForCausalLM

from hybridprune_megatron.config.schema import ReductionConfig
from hybridprune_megatron.export.write import export_model
from tests.export.conftest import make_config, make_model
from tests.export.test_folder import answer_alone
from tests.export.test_parity import assert_equal_models

SCORE = """
from dataclasses import dataclass

from hybridprune_megatron.method.scorer import Scorer
{more}

@dataclass(frozen=True)
class Sizes(Scorer):
    power: float = 1.0

    def attention(self, block):
        return block.k.float().norm(dim=-1) ** self.power

    def mamba(self, block):
        return block.B.float().norm(dim=-1) ** self.power
"""


@pytest.fixture
def cfg(request, tokenizer_dir, tmp_path, monkeypatch):
    """The tiny model under a score that only this test's folder has."""
    module, more = request.param
    (tmp_path / f"{module}.py").write_text(SCORE.format(more=more))
    monkeypatch.syspath_prepend(tmp_path)
    reduction = ReductionConfig.of({"budget": 0.5, "score": {"name": f"{module}.Sizes", "power": 2.0}})
    yield replace(make_config(tokenizer_dir), reduction=reduction)
    del sys.modules[module]


@pytest.mark.parametrize("cfg", [("sizes_of_keys", "")], indirect=True)
def test_the_file_of_a_score_goes_along(cfg, inputs, world, clips, tmp_path) -> None:
    model = make_model(cfg)
    folder = export_model(model, cfg, tmp_path / "hf")
    hf = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert hf.config.reduction["score"] == {"name": "sizes_of_keys.Sizes", "power": 2.0}
    assert_equal_models(model, hf, inputs)
    other = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, reduction={"score": "query"}).eval()
    with pytest.raises(AssertionError):
        assert_equal_models(model, other, inputs)
    text = "<SPECIAL_11>User\n<video>What is it?\n<SPECIAL_11>Assistant\n"
    asked = world.processor(text=text, videos=[str(clips[0])])
    here = hf.generate(**asked, max_new_tokens=4, do_sample=False)[0, -4:].tolist()
    assert answer_alone(folder, clips[0], tmp_path) == here


@pytest.mark.parametrize(
    ("cfg", "line"),
    [
        (("needs_more", "import needs_more"), "its file imports from its own package, needs_more"),
        (("layout", ""), "layout: the export has a layout.py of its own"),
    ],
    indirect=["cfg"],
    ids=["its own package", "a taken name"],
)
def test_a_score_that_cannot_go_along_is_refused_in_one_line(cfg, world, tmp_path, line: str) -> None:
    with pytest.raises(ValueError, match=line) as raised:
        export_model(world.model, cfg, tmp_path / "hf")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "hf").exists()
