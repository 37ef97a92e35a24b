"""What a report says in words, and two analyses on one page."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from hybridprune_megatron.analysis.compare import differences
from hybridprune_megatron.analysis.conclusions import conclusions
from hybridprune_megatron.analysis.report import finite, table, write_figures, write_html, write_json
from hybridprune_megatron.commands.compare import main


def analysis(shift: float = 0.0, needed: bool = True, data: str = "clips") -> dict[str, Any]:
    """Of a model of two layers that score and one that does not; ``shift`` is added to what is kept where needed."""
    clips = [
        {
            "key": f"clip-{number}",
            "half": {"mamba": 0.2 + 0.01 * number, "attention": 0.1},
            "auc": {"mamba": 0.7 if needed else None, "attention": 0.6 if needed else None},
            "inside": 0.5 + shift + 0.01 * number if needed else None,
            "outside": 0.2 + 0.02 * (number % 2) if needed else None,
            "kept": 0.25,
        }
        for number in range(8)
    ]
    rows = [
        {"layer": layer, "type": kind, "tokens_that_hold": {"0.5": 0.2, "0.8": 0.5, "0.95": 0.8}, "gini": 0.5,
         "negative": 0.1, "auc": 0.7 if needed else float("nan")}
        for layer, kind in ((0, "mamba"), (1, "attention"))
    ]  # fmt: skip
    pair = {"spearman": 0.1, "overlap": 0.3, "pairs": 1}
    stability = {
        "layers": [0, 1], "top": 0.25, "spearman": [[1.0, 0.1], [0.1, 1.0]], "overlap": [[1.0, 0.3], [0.3, 1.0]],
        "by_type": {"attention-mamba": pair}, "by_distance": {"attention-mamba": [{"distance": 1, **pair}]},
    }  # fmt: skip
    kept = {"by_layer_and_frame": [[1.0, 1.0], [0.3, 0.2], [0.3, 0.2]], "needed_frames": None}
    run = {"checkpoint": "runs/x", "data": data, "samples": 8, "layers": "M*-", "budget": 0.25,
           "retention_by_layer": [1.0, 0.25, 0.25]}  # fmt: skip
    exposure = [{"layer": 0, "type": "mamba", "kl": 0.2, "median": 0.1}, {"layer": 1, "type": "attention", "kl": 0.001,
                "median": 0.0}]  # fmt: skip
    return finite({
        "run": run, "sparsity": rows, "stability": stability, "kept": kept, "exposure": exposure, "probe": None,
        "clips": clips, "strips": [],
    })  # fmt: skip


def written(folder: Path, result: dict[str, Any]) -> Path:
    write_json(folder / "analysis.json", result)
    write_figures(folder, result)
    return write_html(folder, result)


def test_a_sentence_for_every_section() -> None:
    mass, persistence, evidence, reading = conclusions(analysis())
    assert mass.startswith("Half of the score mass lies in 20 % of the visual tokens in attention layers and 20 % of")
    assert "Two layers share 30 % of their top 25 % (by chance 25 %)" in persistence
    assert "an early decision is a bad guess" in persistence
    assert (
        "53.5 % of the tokens of frames that the answer needs are kept and 21 % of the others, +32.5 points" in evidence
    )
    assert evidence.endswith("8 clips): the score prefers what the answer needs.")
    assert (
        reading == "Visual tokens are still read after layer 0; after layer 1 a schedule may end (KL below 0.01 nats)."
    )
    assert mass.endswith("no kind of layer is twice as sparse as noise.")
    assert conclusions(analysis(-0.5))[2].endswith("the score drops what the answer needs first.")
    assert conclusions(analysis(-0.325))[2].endswith("does not tell them apart on these clips.")


def test_probes_are_put_into_words() -> None:
    rows = [{"shuffled_high": 0.2}]
    drops = {"held": 0.9, "score": 0.8, "absent": 0.1, "dropped_after": 0, "layers": 1}
    found = {"rows": rows, "by_drop": {"mamba": [drops], "attention": [{**drops, "score": 0.2}]}}
    few = {"rows": rows, "by_drop": {"mamba": [{**drops, "held": 0.1}]}}
    result = {**analysis(), "probe": {"contents": {"label": found, "feature": few}}}
    assert [each.rpartition("; ")[2] for each in conclusions(result)[4:]] == [
        "a drop leaves much of it.",
        "a drop loses most of it.",
        "too few clips to read it out.",
    ]


def test_what_the_data_do_not_say_has_no_column_and_no_panel(tmp_path: Path) -> None:
    report = written(tmp_path / "a", analysis(needed=False)).read_text()
    assert "AUC" in written(tmp_path / "b", analysis()).read_text().partition("<table>")[2].replace("(AUC)", "")
    for table_text in report.split("<table>")[1:]:
        body = table_text.partition("</table>")[0]
        assert "AUC" not in body
        assert "nan" not in body
    assert "does not say which frames an answer needs" in report
    narrow, wide = ((tmp_path / name / "sparsity.png").read_bytes() for name in "ab")
    # The width of a PNG.
    assert int.from_bytes(narrow[16:20]) < int.from_bytes(wide[16:20])


def test_columns_without_values_are_left_out() -> None:
    assert "<th>b" not in table([("a", "b"), ("1", "-"), ("2", "-")])
    assert "<th>b" in table([("a", "b"), ("1", "-"), ("2", "0")])


def test_differences_are_paired_by_clip() -> None:
    header, *rows = differences(analysis(), analysis(0.1))[0]
    assert header == ("", "A", "B", "difference", "95 % interval")
    found = {name: rest for name, *rest in rows}
    # Every clip differs by as much, so the interval is a point.
    assert found["of frames that the answer needs"] == ["0.5350", "0.6350", "+0.1000", "+0.1000 to +0.1000"]
    assert found["of all other frames"] == ["0.2100", "0.2100", "+0.0000", "+0.0000 to +0.0000"]
    other, clips = differences(analysis(), analysis(0.1, data="others"))
    assert clips == 0
    assert {name: rest for name, *rest in other}["of frames that the answer needs"][2:] == ["+0.1000", "-"]
    unknown, _ = differences(analysis(), analysis(needed=False))
    assert {name: rest for name, *rest in unknown}["of frames that the answer needs"] == ["0.5350", "-", "-", "-"]


def test_a_page_of_two_analyses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "one", analysis())
    written(tmp_path / "run" / "analysis", analysis(0.1))
    out = tmp_path / "compared.html"
    for _ in range(2):
        # Its own page is replaced.
        main([str(tmp_path / "one"), str(tmp_path / "run"), "--out", str(out)])
        assert "8 clips in common" in capsys.readouterr().out
    text = out.read_text()
    assert text.count("data:image/png;base64,") == text.count("<img") == 1 + 2 * 4
    assert "+0.1000 to +0.1000" in text
    assert "nan" not in "".join(each.partition("</table>")[0] for each in text.split("<table>")[1:])
    assert "href=" not in text


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["{one}", "{tmp}"], "no analysis.json there, nor in its analysis/; run hybridprune analyze first"),
        (["{one}", "{tmp}/none"], "is not a folder"),
        (["{one}", "{old}"], "run hybridprune analyze again"),
        (["{one}", "{one}", "--out", "{tmp}/x.pdf"], "a page is a .html"),
        (["{one}", "{one}", "--out", "{tmp}/none/x.html"], "its folder is not there"),
        (["{one}", "{one}", "--out", "{tmp}/mine.html"], "mine.html"),
    ],
)
def test_what_cannot_be_compared_is_one_line(
    tmp_path: Path, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    written(tmp_path / "one", analysis())
    old = copy.deepcopy(analysis())
    del old["clips"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "analysis.json").write_text(json.dumps(old))
    (tmp_path / "mine.html").write_text("<p>mine</p>")
    places = {"one": tmp_path / "one", "old": tmp_path / "old", "tmp": tmp_path}
    with pytest.raises(SystemExit, match="2"):
        main([each.format(**places) for each in arguments])
    error = capsys.readouterr().err
    assert reason in error
    assert error.count("\n") == 1
