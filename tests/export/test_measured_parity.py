"""The figure that a demo run reports about its export."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.data.batch import IGNORE_LABEL, EncodedSample
from hybridprune_megatron.method.layout import SampleLayout
from studies.demo.parity import max_logit_difference
from tests.export.conftest import row


def samples_of(inputs: dict[str, torch.Tensor]) -> list[EncodedSample]:
    """The same samples as training encodes them."""
    samples = []
    for index in range(len(inputs["input_ids"])):
        single = row(inputs, index)
        ids = single["input_ids"][0]
        layout = SampleLayout.from_kinds(single["token_kinds"][0].tolist(), 4)
        labels = torch.full_like(ids, IGNORE_LABEL)
        samples.append(EncodedSample(str(index), ids, labels, layout, single["pixel_values"]))
    return samples


def test_the_measured_difference_is_small_and_sees_a_changed_weight(world, inputs) -> None:
    samples = samples_of(inputs)
    small = max_logit_difference(world.model, world.hf, samples)
    assert 0 <= small < 1e-4
    # The output layer moves no selection, so the kept tokens stay equal and the logits do not.
    weight = world.hf.language_model.lm_head.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[3] += 0.5
        large = max_logit_difference(world.model, world.hf, samples)
        # To the bit: other tests compare this model's weights.
        weight.copy_(before)
    assert large > 0.01


def test_other_kept_tokens_are_refused(world, inputs) -> None:
    saved = world.hf.config.reduction
    world.hf.set_reduction({"score": "uniform"})
    try:
        with pytest.raises(ValueError, match="keep different tokens in layer 1"):
            max_logit_difference(world.model, world.hf, samples_of(inputs))
    finally:
        world.hf.set_reduction(saved)
