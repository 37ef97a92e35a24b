"""What cannot run is one line that names the value, what is allowed, the key and the fix."""

from __future__ import annotations

import copy
import re
import shutil

import pytest
from omegaconf import DictConfig

from hybridprune_megatron.config import ConfigError, compose, load_config
from hybridprune_megatron.config.compose import CONF_DIR, compose_config, set_keys, to_config

FALLING = "1,0.5,0.5,0.25,0.1,0.1,0.05,0.05,0.05,0.05"
# What is wrong with an override by itself: overrides, then the whole line (a regular expression).
OVERRIDE_CASES = {
    "sizes without experts": (
        ["model=demo_experts", "model.hybrid_pattern=M-M"],
        r".*has no E layer, and model.experts is set; give both or neither",
    ),
    "experts from nowhere": (
        ["model.experts={num_experts: 4}"],
        r"model.experts is null in this model and cannot be filled from the command line; .*",
    ),
    "one expert a token": (
        ["model=demo_experts", "model.experts.experts_per_token=1"],
        r"model.experts.experts_per_token=1: must be at least 2.*",
    ),
    "more experts than a token reaches": (
        ["model=demo_experts", "model.experts.experts_per_token=5"],
        r"model.experts.experts_per_token=5: must not exceed the 4 experts .*",
    ),
    "experts ranked otherwise": (
        ["model=demo_experts", "model.experts.experts_per_token=3"],
        r"model.experts.groups_per_token=2: must be half of experts_per_token=3: .*",
    ),
    "unsplittable experts": (
        ["model=demo_experts", "parallel.expert=3", "trainer.devices=3"],
        r"model.experts.num_experts=8: .*parallel.expert=3.*",
    ),
    "expert parallelism without processes": (
        ["model=demo_experts", "parallel.expert=2", "trainer.devices=1"],
        r"parallel.expert=2: must divide the 1 processes of a pipeline stage.*",
    ),
    "experts without sequence parallelism": (
        ["model=demo_experts", "parallel.tensor=2", "trainer.devices=2"],
        r"parallel.sequence_parallel=false: every tensor-parallel rank would send the same tokens .*",
    ),
    "rows that mamba_ssm cannot address": (
        ["model.mamba_num_heads=128", "model.mamba_head_dim=128"]
        + ["model.max_sequence_length=131072", "data.sequence_length=131072"],
        r"data.sequence_length=131072: 16384 channels of a Mamba layer on a rank times 131072 tokens are 2\^31 numbers "
        r"or more; lower it below 131072, or raise parallel.tensor or parallel.context",
    ),
    "unknown top-level key": (
        ["xyz=1"],
        r"xyz=1: unknown key xyz; the top level has name, .*parallel.*\(see --help-all\)",
    ),
    "flat key of version 0.1": (
        ["reduction.midpoint=0.3"],
        r"reduction.midpoint=0.3: reduction.midpoint is reduction.schedule.midpoint since version 0.2",
    ),
    "scorer of version 0.1": (["reduction.scorer=random"], r".*reduction.scorer is reduction.score since version 0.2"),
    "key without its group": (["budget=0.3"], r"budget=0.3: unknown key budget; did you mean reduction.budget\?"),
    "misspelled key": (["reduction.bugdet=1"], r".*unknown key reduction.bugdet; did you mean reduction.budget\?"),
    "misspelled group": (["reducton.budget=1"], r".*unknown key reducton; did you mean reduction.budget\?"),
    "misspelled nested key": (["model.trainable.vison=true"], r".*did you mean model.trainable.vision\?"),
    "key below a value": (["trainer.seed.x=1"], r"trainer.seed.x=1: unknown key trainer.seed; .*"),
    "unknown option": (
        ["reduction=quary"],
        r"reduction=quary: conf/reduction has .*none, .*query, .*mean reduction=query\?",
    ),
    "value for a group": (["reduction=0.5"], r"reduction=0.5: .*single values are set as reduction.key=value.*"),
    "missing experiment": (["experiment=dmo"], r"experiment=dmo: conf/experiment has .*demo.*mean experiment=demo\?"),
    "text for a number": (["reduction.budget=abc"], r"reduction.budget=abc: has the wrong type, expected a number .*"),
    "fraction for a count": (["trainer.seed=1.5"], r".*expected a whole number .*set e.g. trainer.seed=1234"),
    "number for a flag": (
        ["parallel.sequence_parallel=perhaps"],
        r".*expected true or false .*sequence_parallel=False",
    ),
    "text for a list": (["tuning.budget.choices=x"], r".*expected a list of numbers .*"),
    "value for a nested group": (["model.vision=3"], r".*set one of its keys, e.g. model.vision.hidden_size=\.\.\."),
    "null for a number": (["trainer.max_steps=null"], r"trainer.max_steps=null: has the wrong type.*"),
    "not an override": (["demo"], r"demo: is not an override; write key=value.*"),
    "unreadable override": (["reduction.layers=[0,"], r"reduction.layers=\[0,: cannot be read.*quote it.*"),
    "sweep": (["reduction.budget=0.1,0.2"], r".*names several values, and a run takes one.*"),
    "deletion": (["~reduction.layers"], r"~reduction.layers: keys cannot be deleted.*"),
    "needless plus": (["+reduction.budget=0.2"], r"\+reduction.budget=0.2: .* exists already; leave the \+ out"),
    "plus on a group": (["+experiment=demo"], r"\+experiment=demo: experiment exists already; leave the \+ out"),
    "unset exp_manager key": (["exp_manager.foo=1"], r".*to pass it on write \+exp_manager.foo=value"),
    "broken interpolation": (["reduction.budget=${nope}"], r"reduction.budget: Interpolation key 'nope' not found"),
    "a value that is checked": (
        ["experiment=demo", "reduction.budget=1.5"],
        r"reduction.budget=1.5: must be above 0.*",
    ),
    "frames without a tower": (
        ["model=nemotron_h_8b"],
        r"data.sampling=uniform: .*no vision tower.*data.sampling=none.*",
    ),
    "drops without a tower": (
        ["model=nemotron_h_8b", "data=text_sft"],
        r"reduction.budget=0.25: .*set reduction=none",
    ),
    "tower without frames": (["data=text_sft"], r"data.sampling=none: .*needs frames.*"),
}
# What is wrong with values: the same, on top of the default configuration.
VALUE_CASES = {
    "budget above 1": (["reduction.budget=1.5"], r"reduction.budget=1.5: must be above 0 and at most 1.*=0.25.*"),
    "budget 0": (["reduction.budget=0"], r"reduction.budget=0.0: must be above 0 and at most 1.*"),
    "budget nan": (["reduction.budget=nan"], r"reduction.budget=nan: must be above 0 and at most 1.*"),
    "unreachable budget": (
        ["reduction.budget=0.01"],
        r"reduction.budget=0.01: .*raise the budget or name earlier layers",
    ),
    "unknown schedule": (
        ["reduction.schedule=sigmod"],
        r".*allowed are cosine, linear, listed, plateau, sigmoid, stages, step; did you mean sigmoid\?",
    ),
    "flat sigmoid": (
        ["reduction.schedule.slope=0"],
        r"reduction.schedule.slope=0: must be a finite number above 0.*",
    ),
    "midpoint outside": (
        ["reduction.schedule.midpoint=1.2"],
        r"reduction.schedule.midpoint=1.2: must be from 0 to 1.*",
    ),
    "no tokens": (["reduction.select.min_tokens=0"], r"reduction.select.min_tokens=0: must be at least 1.*"),
    "unknown scorer": (["reduction.score=querry"], r"reduction.score=querry: allowed are query,.*query\?"),
    "unknown layers word": (["reduction.layers=attn"], r"reduction.layers=attn: allowed.*did you mean attention\?"),
    "one layer, no list": (["reduction.layers=2"], r"reduction.layers=2: allowed are.*=\[0,2\]"),
    "layer that does not exist": (["reduction.layers=[99]"], r".*layer 99: .*layers 0 to 9.*\[0, 2, 3, 5, 7, 8\]"),
    "negative layer": (["reduction.layers=[-1]"], r"reduction.layers names layer -1: .*"),
    "layer that cannot score": (["reduction.layers=[1]"], r".*layer 1, a '-': only M and \*.*\[0, 2, 3, 5, 7, 8\]"),
    "layer twice": (["reduction.layers=[0,0]"], r".*a layer is named twice.*"),
    "no such layers": (
        ["model.hybrid_pattern=M-M-", "reduction.layers=attention"],
        r"reduction.layers=attention: .*has no such layer.*",
    ),
    "schedule that rises": (
        ["reduction.schedule={name: listed, retention: [1,0.5,0.6,0.1,0.1,0.1,0.1,0.1,0.1,0.1]}"],
        r"reduction.schedule.retention\[2\]=0.6: rises from 0.5 of layer 1.*use at most 0.5 from layer 2 on",
    ),
    "schedule too short": (
        ["reduction.schedule={name: listed, retention: [1,0.5]}"],
        r"reduction.schedule.retention=2 numbers: .*has 10 layers.*",
    ),
    "schedule starts below 1": (
        [f"reduction.schedule={{name: listed, retention: [0.9,{FALLING[2:]}]}}"],
        r"reduction.schedule.retention\[0\]=0.9: every visual token enters.*",
    ),
    "schedule falls behind an MLP": (
        ["reduction.schedule={name: listed, retention: [1,0.5,0.4,0.1,0.1,0.1,0.1,0.1,0.1,0.1]}"],
        r"reduction.schedule.retention\[2\]=0.4: .* the layer before, 1, may not drop; .*",
    ),
    "schedule falls below 0": (
        ["reduction.schedule={name: listed, retention: [1,-0.1,-0.1,0,0,0,0,0,0,0]}"],
        r"reduction.schedule.retention\[1\]=-0.1: must be from 0 to 1; .*",
    ),
    "floor above the budget": (
        ["reduction.schedule=linear", "reduction.schedule.floor=0.3"],
        r"reduction.schedule.floor=0.3: must lie below reduction.budget=0.25.*",
    ),
    "floor of a step": (
        ["reduction.schedule=step", "reduction.schedule.floor=0.1"],
        r".*floor=0.1: reduction.schedule=step has the keys layer; .*",
    ),
    "step too late": (
        ["reduction.schedule=step", "reduction.schedule.layer=3"],
        r".*keeps a mean of 0.400; raise the budget or lower reduction.schedule.layer",
    ),
    "stages too few": (
        ["reduction.schedule=stages", "reduction.schedule.stages=2"],
        r".*keeps a mean of 0.600; raise the budget or raise reduction.schedule.stages.*",
    ),
    "one stage": (
        ["reduction.schedule=stages", "reduction.schedule.stages=1"],
        r"reduction.schedule.stages=1: must be at least 2.*",
    ),
    "every zeroth layer": (["reduction.layers=every_0"], r"reduction.layers=every_0: .*did you mean every_2\?"),
    "unknown pooling": (
        ["reduction.score.mamba_pooling=max"],
        r"reduction.score.mamba_pooling=max: allowed are mean, max_groups, max_heads.*",
    ),
    "unknown function": (["reduction.score.mamba_function=rellu"], r".*did you mean relu\?"),
    "negative smoothing": (
        ["reduction.select.smoothing_frames=-1"],
        r"reduction.select.smoothing_frames=-1: must be at least 0.*",
    ),
    "share without a front": (["reduction.front.retention=0.5"], r".*reduction.front=none passes on everything; .*=1"),
    "front without a share": (["reduction.front=evs"], r"reduction.front.retention=1.0: .*; set e.g. .*=0.5"),
    "front below the budget": (
        ["reduction.front=evs", "reduction.front.retention=0.2"],
        r"reduction.front.retention=0.2: must be at least reduction.budget=0.25.*",
    ),
    "schedule starts beside the front": (
        [
            f"reduction.schedule={{name: listed, retention: [1.0,{FALLING[2:]}]}}",
            "reduction.front=evs",
            "reduction.front.retention=0.5",
        ],
        r"reduction.schedule.retention\[0\]=1.0: reduction.front.retention=0.5; set .*=\[0.5,...\]",
    ),
    "schedule off the budget": (
        [f"reduction.schedule={{name: listed, retention: [{FALLING}]}}", "reduction.budget=0.5"],
        r".*\(its mean\)=0.265: .*set reduction.budget=0.265.*",
    ),
    "experts without sizes": (
        ["model.hybrid_pattern=MEM"],
        r"model.hybrid_pattern=MEM: has E layers, and model.experts is null; give both or neither",
    ),
    "expert parallelism without experts": (
        ["parallel.expert=2", "trainer.devices=2"],
        r"parallel.expert=2: model .* has no experts .*",
    ),
    "unknown symbol": (["model.hybrid_pattern=MXM"], r".*unknown symbol 'X'; use only M .*\* .*- .*\| .*"),
    "empty stage": (["model.hybrid_pattern=M-|"], r".*every pipeline stage needs a layer.*"),
    "pipeline without cuts": (
        ["parallel.pipeline=2", "trainer.devices=2"],
        r"parallel.pipeline=2: .*into 1 stage\(s\); set model.hybrid_pattern='M-M\*-\|M-M\*-' or parallel.pipeline=1",
    ),
    "chunks without pipeline": (
        ["parallel.virtual_pipeline=2"],
        r".*one process runs all layers.* or parallel.pipeline=2",
    ),
    "too few cuts for chunks": (
        ["parallel.pipeline=4", "parallel.virtual_pipeline=2", "trainer.devices=4", "model.hybrid_pattern=M-M*|-M-M*-"],
        r"parallel.pipeline=4: .*into 2 stage\(s\) and parallel.virtual_pipeline=2 asks for 8; set .*",
    ),
    "cuts without pipeline": (["model.hybrid_pattern=M-|M*"], r"parallel.pipeline=1: .*or parallel.pipeline=2"),
    "pipeline deeper than the model": (
        ["model.hybrid_pattern=M*", "parallel.pipeline=3", "trainer.devices=3"],
        r".*the model has only 2 layers.*",
    ),
    "tensor beyond the groups": (
        ["parallel.tensor=4", "trainer.devices=4"],
        r"model.mamba_num_groups=2: must be a multiple of parallel.tensor=4.*",
    ),
    "tensor beyond the query groups": (
        ["parallel.tensor=4", "trainer.devices=4", "model.mamba_num_groups=4"],
        r"model.num_query_groups=2: .*",
    ),
    "heads and groups": (
        ["model.num_query_groups=3"],
        r"model.num_attention_heads=4: must be a multiple of .*groups=3.*",
    ),
    "sequence parallel alone": (["parallel.sequence_parallel=true"], r".*needs parallel.tensor of 2 or more.*=false"),
    "too few processes": (["parallel.tensor=2"], r"trainer.num_nodes\*trainer.devices=1: .*trainer.devices=2"),
    "batch not shared evenly": (
        ["trainer.devices=3"],
        r"trainer.global_batch_size=4: .*data-parallel size 3 .*trainer.global_batch_size=6",
    ),
    "context and sequence length": (
        ["parallel.context=2", "trainer.devices=2", "data.sequence_length=2050"],
        r"data.sequence_length=2050: must be a multiple of 2\*parallel.context=4.*",
    ),
    "a teacher and shards": (
        ["parallel.context=2", "trainer.devices=2", "tuning.distillation.weight=0.5"],
        r"parallel.context=2: must be 1 with tuning.distillation.weight=.*or tuning.distillation.weight=0",
    ),
    "stages that learn nothing": (
        [
            "parallel.pipeline=2",
            "trainer.devices=2",
            "model.hybrid_pattern=M-M*-|M-M*-",
            "model.trainable.language=false",
        ],
        r"model.trainable.language=False: leaves stages after the first without anything to learn.*",
    ),
    "groups that ranks share": (
        ["parallel.context=4", "trainer.devices=4", "reduction.score.mamba_pooling=max_groups"],
        r"reduction.score.mamba_pooling=max_groups: needs whole groups on a rank: 2 are shared by parallel.context=4.*",
    ),
    "overlap alone": (["parallel.overlap_param_gather=true"], r".*needs parallel.distributed_optimizer=true.*"),
    "micro batches of 2": (["trainer.micro_batch_size=2"], r".*must be 1 .*make data.sequence_length longer.*"),
    "precision": (["trainer.precision=fp16"], r"trainer.precision=fp16: allowed are fp32, bf16.*"),
    "no frames": (["data.num_frames=0"], r"data.num_frames=0: must be at least 1.*"),
    "negative frame rate": (["data.sampling=fps", "data.fps=-1"], r"data.fps=-1.0: must be above 0 and at most 1000.*"),
    "video longer than a pack": (
        ["data.num_frames=128"],
        r"data.num_frames=128: .*fills 2048 tokens.*lower data.num_frames.*",
    ),
    "pack longer than the context": (
        ["data.sequence_length=8192"],
        r".*must not exceed model.max_sequence_length=4096.*",
    ),
    "unknown conversation": (["data.conversation=turns"], r"data.conversation=turns: allowed are first_question, .*"),
    "frame text": (
        ["data.frame_text='{frame}'"],
        r"data.frame_text='{frame}': may use \{index\} and \{seconds\} only.*",
    ),
    "frame size": (
        ["model.vision.frame_size=120"],
        r"model.vision.frame_size=120: must be a multiple of .*patch_size=16.*",
    ),
    "nothing trained": (
        ["model.trainable.projector=false", "model.trainable.language=false"],
        r".*something must be trained.*",
    ),
    "learning rates": (["optim.min_lr=1"], r"optim.min_lr=1.0: must be from 0 to optim.lr=2e-05.*"),
    "endless warmup": (
        ["optim.warmup_steps=50", "optim.decay_steps=50"],
        r"optim.warmup_steps=50: must be below optim.decay_steps=50.*",
    ),
    "beta": (["optim.beta2=1"], r"optim.beta2=1.0: must be from 0 to below 1.*"),
}


def assert_line(message: str, line: str) -> None:
    assert "\n" not in message
    assert re.fullmatch(line, message), message


@pytest.mark.parametrize(("overrides", "line"), OVERRIDE_CASES.values(), ids=OVERRIDE_CASES)
def test_override(overrides: list[str], line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(overrides)
    assert_line(str(caught.value), line)


@pytest.fixture(scope="module")
def composed_default() -> DictConfig:
    """Composing takes a quarter of a second, so the value cases share one."""
    return compose_config()


@pytest.mark.parametrize(("overrides", "line"), VALUE_CASES.values(), ids=VALUE_CASES)
def test_value(overrides: list[str], line: str, composed_default: DictConfig) -> None:
    changed = copy.deepcopy(composed_default)
    set_keys(changed, overrides)
    with pytest.raises(ConfigError) as caught:
        to_config(changed)
    assert_line(str(caught.value), line)


def test_unknown_key_in_a_file(tmp_path, monkeypatch) -> None:
    """A misspelled key in a yaml of the user's own is named as well."""
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf/reduction/mine.yaml").write_text("score: query\nbugdet: 0.5\n")
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    line = r"^reduction.bugdet: unknown key .* did you mean reduction.budget\? \(a file in conf/"
    with pytest.raises(ConfigError, match=line):
        load_config(["reduction=mine"])


def test_missing_value_in_a_file(tmp_path, monkeypatch) -> None:
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf/reduction/mine.yaml").write_text("score: query\n")
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    with pytest.raises(ConfigError, match=r"^reduction.budget: is not set, .*give reduction.budget=") as caught:
        load_config(["reduction=mine"])
    assert "\n" not in str(caught.value)


def test_broken_yaml(tmp_path, monkeypatch) -> None:
    shutil.copytree(CONF_DIR, tmp_path / "conf")
    (tmp_path / "conf/reduction/mine.yaml").write_text("score: [query\n")
    monkeypatch.setattr(compose, "CONF_DIR", tmp_path / "conf")
    with pytest.raises(ConfigError, match=r"mine\.yaml") as caught:
        load_config(["reduction=mine"])
    assert "\n" not in str(caught.value)
