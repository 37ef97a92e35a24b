"""Our language model against transformers' on the same weights: logits, loss, every gradient, packed and one by one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.parity.ours import config_of, model_of, text_batch
from tests.parity.twins import STRUCTURES, VOCAB, write_language_twin
from tests.worlds import run_world

#: Odd, one token, one chunk of the scan and one more.
LENGTHS = [37, 1, 17, 16]
LOGITS = 2e-4
GRADIENTS = 2e-4
#: An expert that only the text of one token visits has no gradient; in a packed sequence the running sums of the scan
#: leave rounding there, 1e-10 where others are near 1.
ROUNDING = 1e-9


def _logits(folder: Path, time_step_min: float) -> np.ndarray:
    with torch.no_grad():
        return model_of(config_of(folder, time_step_min=time_step_min)).logits(text_batch(LENGTHS, VOCAB))[0].numpy()


def test_steps_can_be_held_up_as_transformers_does(tmp_path: Path) -> None:
    """Weights that were trained under its clamp want it, and others do not: both conventions are there."""
    floor = 0.5
    theirs = write_language_twin(tmp_path / "hf", "8b", time_step_min=floor)
    ids = text_batch(LENGTHS, VOCAB).input_ids[: LENGTHS[0]]
    with torch.no_grad():
        wanted = theirs(input_ids=ids.unsqueeze(0)).logits[0]
    held, free = (
        torch.from_numpy(run_world(1, _logits, tmp_path / "hf", value)[0])[: LENGTHS[0]] for value in (floor, 0.0)
    )
    assert (held - wanted).abs().max() < LOGITS
    assert (free - wanted).abs().max() > 100 * LOGITS


def _ours(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """Logits and losses of a packed sequence, and gradients of the summed loss under transformers' names."""
    from hybridprune_megatron.engine.weights import whole_weights
    from hybridprune_megatron.huggingface.source import open_weights

    model = model_of(config_of(folder))
    batch = text_batch(LENGTHS, VOCAB)
    with torch.no_grad():
        logits, _ = model.logits(batch)
    loss = model(batch)
    loss.sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.grad)
    theirs = open_weights(folder).table.to_theirs(whole_weights(model))
    learned = {name: value.detach().numpy() for name, value in theirs.items() if not name.endswith("correction_bias")}
    return logits.numpy(), loss.detach().numpy(), learned


def _as_in_files(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers holds a layer's experts in one tensor, files in one each."""
    single = {}
    for name, value in tensors.items():
        layer, stacked, part = name.rpartition(".experts.")
        for number, expert in enumerate(value) if stacked else ():
            single[f"{layer}.experts.{number}.{part}.weight"] = expert
        if not stacked:
            single[name] = value
    return single


@pytest.fixture(scope="module", params=STRUCTURES)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("twin") / "hf"
    theirs = write_language_twin(folder, request.param)
    return theirs, run_world(1, _ours, folder)[0]


def test_logits_loss_and_every_gradient(results) -> None:
    theirs, (logits, loss, gradients) = results
    logits, loss = torch.from_numpy(logits), torch.from_numpy(loss)
    batch = text_batch(LENGTHS, VOCAB)
    expected, losses, start = [], [], 0
    for length in LENGTHS:
        ids = batch.input_ids[start : start + length]
        # transformers' torch path refuses packed sequences: one text at a time.
        out = theirs(input_ids=ids.unsqueeze(0)).logits[0]
        expected.append(out)
        losses.append(torch.nn.functional.cross_entropy(out[:-1], ids[1:], reduction="none"))
        start += length
    wanted = torch.cat(expected)
    assert (logits - wanted).abs().max() < LOGITS
    assert wanted.std() > 0.1
    torch.testing.assert_close(loss, torch.cat(losses).detach(), rtol=1e-4, atol=LOGITS)
    theirs.zero_grad()
    torch.cat(losses).sum().backward()
    found = _as_in_files({name.replace("model.", "backbone.", 1): p.grad for name, p in theirs.named_parameters()})
    assert found.keys() == gradients.keys()
    for name, gradient in found.items():
        error = (torch.from_numpy(gradients[name]) - gradient).norm()
        assert error <= GRADIENTS * gradient.norm() + ROUNDING, (name, float(error), float(gradient.norm()))
