"""The stand-ins against the sources of the real packages; and calls of them, which these are held to when they run."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hybridprune_megatron.ops.conv import causal_conv_silu
from tests import gpu_packages
from tests.gpu_packages import engine, stand_in
from tests.gpu_packages.signatures import (
    REAL,
    RECIPES,
    defined_names,
    differences,
    held_to,
    real_signature,
    recipe_signature,
    sources,
)
from tests.tracked import ROOT

ABSENT = "{0}'s source could not be fetched: make setup takes it from the package index"


def folder_of(package: str) -> Path:
    """The source of a package; the test is skipped without it."""
    found = sources(package)
    if found is None:
        pytest.skip(ABSENT.format(package))
    return found


@pytest.mark.parametrize("name", REAL)
def test_a_stand_in_takes_what_the_real_one_takes(name: str) -> None:
    folder_of(REAL[name][0])
    owner, member = stand_in(name)
    real = real_signature(name)
    assert real is not None
    assert differences(inspect.signature(getattr(owner, member)), real) == []


@pytest.mark.parametrize("name", engine.RECIPES)
def test_a_recipe_has_the_fields_that_the_configuration_sets(name: str) -> None:
    folder_of("transformer_engine")
    real = recipe_signature(name)
    assert real is not None
    assert "fp8_format" in real.parameters
    if name == "DelayedScaling":
        defaults = {
            key: ast.literal_eval(real.parameters[key].default) for key in ("amax_history_len", "amax_compute_algo")
        }
        made = engine.RECIPES[name](fp8_format=engine.Format.HYBRID)
        assert defaults == {key: getattr(made, key) for key in defaults}


def test_what_is_imported_is_there() -> None:
    """Of the modules that the stand-ins are put in the place of."""
    folder = folder_of("transformer_engine")
    source = inspect.getsource(gpu_packages.install)
    modules = {
        "pytorch/__init__.py": ["Linear", "LayerNormLinear", "GroupedLinear", "RMSNorm", "LayerNorm", "Fp8Padding"],
        "pytorch/fp8.py": ["FP8GlobalStateManager", "fp8_autocast", "fp8_model_init"],
        RECIPES: ["Format", *engine.RECIPES],
        "pytorch/distributed.py": ["checkpoint", "CudaRNGStatesTracker", "activation_recompute_forward"],
        "pytorch/router.py": re.findall(r'"(fused_\w+)"', source),
        "pytorch/tensor/utils.py": re.findall(r'"(replace_raw\w+|cast_master\w+|post_all\w+)"', source),
    }
    for module, names in modules.items():
        assert len(names) > 2
        assert set(names) <= defined_names(folder / module), module


def test_the_versions_are_those_of_the_lock() -> None:
    locked = (ROOT / "requirements" / "gpu_sources.lock").read_text()
    assert f"transformer-engine=={gpu_packages.ENGINE_VERSION} " in locked
    for package in ("transformer_engine", "mamba_ssm", "causal_conv1d"):
        version = folder_of(package).parent.name.rpartition("-")[2]
        assert f"{package.replace('_', '-')}=={version} " in locked


def written(folder: Path, old: str, new: str) -> Path:
    """Transformer Engine's linear in a later version."""
    name = REAL["Linear.forward"][1].partition(":")[0]
    source = (folder_of("transformer_engine") / name).read_text()
    assert source.count(old) > 0
    path = folder / name
    path.parent.mkdir(parents=True)
    path.write_text(source.replace(old, new))
    return folder


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("        fp8_output: Optional[bool] = False,", "", "fp8_output is not there"),
        (
            "        fp8_output: Optional[bool] = False,",
            "        fp8_output: bool = True,",
            "fp8_output=False is True there",
        ),
        (
            "        inp: torch.Tensor,\n        is_first",
            "        inp: torch.Tensor,\n        must: int,\n        is_first",
            "must must be",
        ),
    ],
    ids=["gone", "another default", "more must be given"],
)
def test_a_signature_that_has_changed_is_seen(tmp_path: Path, old: str, new: str, said: str) -> None:
    real = real_signature("Linear.forward", written(tmp_path, old, new))
    assert real is not None
    found = differences(inspect.signature(engine.Linear.forward), real)
    assert [said in each for each in found] == [True]


def test_an_argument_that_the_real_one_lacks_is_refused() -> None:
    def function(inp: int, more: int = 0) -> int:
        return inp + more

    held = held_to(function, inspect.signature(lambda inp: None), "Linear")
    assert held(1) == 1
    with pytest.raises(TypeError, match=r"^the real Linear would refuse this call: got an unexpected keyword .*more"):
        held(1, more=2)


def reference() -> Callable[..., Tensor]:
    """causal-conv1d's own convolution in plain torch, out of a module that imports its kernels."""
    source = (folder_of("causal_conv1d") / "causal_conv1d_interface.py").read_text()
    kept = [node for node in ast.parse(source).body if getattr(node, "name", "") == "causal_conv1d_ref"]
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(kept, []), "causal_conv1d_interface.py", "exec"), names)
    return names["causal_conv1d_ref"]


def test_the_convolution_is_that_of_causal_conv1d() -> None:
    """Sample by sample, for the reference knows no packing; outputs and gradients."""
    conv, lengths = reference(), [5, 1, 9]
    generator = torch.Generator().manual_seed(3)
    values = [torch.randn(shape, generator=generator) for shape in ((sum(lengths), 6), (6, 4), (6,))]
    ours, theirs = ([value.clone().requires_grad_() for value in values] for _ in range(2))
    found = causal_conv_silu(*ours, lengths)
    parts = [conv(part.T.unsqueeze(0), *theirs[1:], activation="silu")[0].T for part in theirs[0].split(lengths)]
    other = torch.cat(parts)
    torch.testing.assert_close(found, other)
    weight = torch.randn(found.shape, generator=generator)
    (found * weight).sum().backward()
    (other * weight).sum().backward()
    for one, two in zip(ours, theirs):
        torch.testing.assert_close(one.grad, two.grad)
