"""Solves the share of visual tokens per layer from what drops do to the answers, and checks it on other clips.

    hybridprune solve checkpoint=runs/demo data=my/shards out=runs/demo/solved
    hybridprune solve checkpoint=assets/demo/base.safetensors experiment=demo out=runs/solved reduction.budget=0.35
    hybridprune solve checkpoint=runs/demo out=runs/demo/solved speedup=4

For every layer that may drop and every level, one drop after that layer is measured alone, as the divergence (KL) of
the answers from those with every token. A shortest path through these damages gives the list. Stopped and started
again, it resumes. It prints how far the list depends on the clips, and says to keep the configured schedule where the
list does not beat it on other clips. Keys of its own:

{keys}

Every other key=value changes the checkpoint's configuration; with bare weights (a .safetensors file, a Hugging Face
folder) they compose it. docs/analysis.md explains the result.
"""

from __future__ import annotations

import sys

from hybridprune_megatron.analysis.settings import DAMAGES_FILE, SOLVED_BY, SOLVED_FILE, SolveSettings
from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_apart, check_file
from hybridprune_megatron.config.own_keys import read_checkpoint_command
from hybridprune_megatron.engine.quiet import quiet_libraries

#: Nothing solved was better below this budget where it was tried.
LOWEST_BUDGET = 0.2


@one_line_errors("solve")
def main(argv: list[str]) -> None:
    """Reads the command line; a wrong setting ends it with one line and code 2."""
    # Before the slow imports, which take half a minute.
    settings, checkpoint, cfg, data = read_checkpoint_command("solve", __doc__, SolveSettings, argv, "train")
    if settings.speedup is None and cfg.reduction.budget < LOWEST_BUDGET:
        print(
            f"reduction.budget={cfg.reduction.budget}: below {LOWEST_BUDGET} damages no longer add up, and no solved "
            "list was better where it was tried",
            file=sys.stderr,
        )
    out = check_apart(settings.out, [checkpoint, data])
    for name in (DAMAGES_FILE, SOLVED_FILE):
        check_file(out / name, SOLVED_BY, "out")
    quiet_libraries()
    from hybridprune_megatron.analysis.solve import report, solve
    from hybridprune_megatron.engine.load import load_model
    from hybridprune_megatron.engine.parallel import shut_down

    model = load_model(checkpoint, cfg)
    facts = {"checkpoint": settings.checkpoint, "data": str(data)}
    result = solve(model, cfg, settings, data, facts)
    shut_down()
    print(report(result))
    print(f"{settings.out}: solved.json, damages.jsonl")
