"""The first minutes on a GPU: steps fail, run out of time and are killed here, and the report is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import gpu_bring, gpu_day_one
from scripts.gpu_day_one import Command, Result, Step, main, run_step, slug, table
from tests.tracked import ROOT


def python(text: str, **settings: object) -> Command:
    return Command(("-c", text), **settings)  # type: ignore[arg-type]


def step(*commands: Command) -> Step:
    return Step("a step", 60, commands)


def test_a_step_that_fails_says_why_and_its_next_program_runs(tmp_path: Path) -> None:
    measured = python("import sys; open(sys.argv[1] + '/it.json', 'w').write('{\"ms\": 3}')", report="it.json")
    broken = python("print('before'); raise ValueError('no such kernel')")
    found = run_step(1, step(broken, measured), False, 60, tmp_path)
    assert (found.status, found.figures) == ("failed", {"it": {"ms": 3}})
    assert found.said.endswith("ValueError: no such kernel (status 1)")


def test_a_check_that_fails_is_named(tmp_path: Path) -> None:
    results = {"scan": None, "norm": "Traceback ...\n  File x\nAssertionError: 0.3"}
    wrote = python(f"import sys; open(sys.argv[1] + '/results.json', 'w').write({json.dumps(results)!r})", checks=True)
    found = run_step(2, step(wrote), False, 60, tmp_path)
    assert (found.status, found.said) == ("failed", "norm: AssertionError: 0.3")


def test_a_step_ends_in_time_with_all_that_it_started(tmp_path: Path) -> None:
    # A child that ignores the first signal.
    child = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)"
    parent = (
        f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    )
    start = time.monotonic()
    found = run_step(3, step(python(f"{parent}; p.wait()"), python("print(1)")), False, 1.5, tmp_path)
    assert time.monotonic() - start < 30
    assert found.status == "out of time"
    assert "stopped after 2 s" in found.said or "stopped after 1 s" in found.said
    assert "no time was left" in found.said
    pid = int((tmp_path / "step_3_0" / "log").read_text().split()[0])
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.05)


def test_what_a_machine_lacks_is_skipped(tmp_path: Path) -> None:
    assert run_step(4, step(Command(("-m", "x"))), True, 60, tmp_path).status == "skipped"
    found = run_step(1, step(Command(("a",), program="no-such-sanitizer")), False, 60, tmp_path)
    assert (found.status, found.said) == ("passed", "no-such-sanitizer is not on the PATH: left out")


def test_the_report_is_whole_after_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    versions = {"device": "NVIDIA H100 80GB HBM3", "versions": {"torch": "2.13.0"}}
    said = f"import sys; open(sys.argv[1] + '/versions.json', 'w').write({json.dumps(versions)!r})"
    looks = f"import json; assert len(json.load(open({str(out)!r}))['steps']) == 2, 'not whole'"
    steps = [step(python(text, report=name)) for text, name in ((said, "versions.json"), ("1 / 0", ""), (looks, ""))]
    monkeypatch.setattr(gpu_day_one, "STEPS", tuple(steps))
    monkeypatch.setattr(gpu_day_one, "WORK", tmp_path / "work")
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert main(["--out", str(out)]) == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    report = json.loads(out.read_text())
    assert [each["status"] for each in report["steps"]] == ["passed", "failed", "passed"]
    assert (report["device"], report["versions"]) == (versions["device"], versions["versions"])
    assert "ZeroDivisionError" in capsys.readouterr().out
    monkeypatch.setattr(gpu_day_one, "PAGES", tmp_path)
    assert gpu_day_one.default_out(report) == tmp_path / "h100_80gb_hbm3.json"
    assert gpu_day_one.default_out(report | {"rehearsal": True}) == tmp_path / "work" / "rehearsal.json"


def test_the_limits_of_all_steps_fit_the_whole() -> None:
    assert sum(each.seconds for each in gpu_day_one.STEPS) <= 60 * gpu_day_one.MINUTES - gpu_day_one.SPARE_SECONDS
    modules = [c.arguments[1] for s in gpu_day_one.STEPS for c in (*s.on_gpu, *s.on_cpu) if c.arguments[0] == "-m"]
    for name in {*modules} - {"pytest"}:
        assert (ROOT / f"{name.replace('.', '/')}.py").is_file(), name


def test_names_and_table() -> None:
    assert slug("NVIDIA H200") == "h200"
    assert slug("2 cores of Intel(R) Xeon(R)") == "2_cores_of_intel_r_xeon_r"
    shown = table([Result(0, "versions", "passed", 3.25), Result(1, "operators", "failed", 10.0, "why")]).splitlines()
    assert shown[1] == "0  versions   passed  3.2"
    assert shown[2] == "1  operators  failed  10.0     why"


def test_the_script_passes_its_arguments_on() -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    for arguments, said in ((["--help"], "--rehearse"), (["prepare", "--help"], "--there")):
        done = subprocess.run(
            ["scripts/gpu_day_one.sh", *arguments],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        assert said in done.stdout


def test_what_is_needed_is_found_through_extras() -> None:
    asks = {
        "a": ["B[more]>=1", "c; extra == 'x'", "d; python_version < '3'"],
        "b": ["e; extra == 'more'", "f; extra == 'less'", "a"],
    }
    assert gpu_bring.needed(["A"], lambda name: asks.get(name, [])) == {"a", "b", "e"}


def test_an_archive_that_is_too_large_is_refused(tmp_path: Path) -> None:
    (tmp_path / "parts" / "site" / "big").mkdir(parents=True)
    (tmp_path / "parts" / "site" / "big" / "x").write_bytes(os.urandom(2**20))
    assert gpu_bring.pack(tmp_path / "parts", tmp_path / "small.tar.xz") > 2**20
    with pytest.raises(
        ValueError, match=r"^out\.tar\.xz would take 1 MiB, allowed are 0; .* big 1 MiB: name with --there"
    ):
        gpu_bring.pack(tmp_path / "parts", tmp_path / "out.tar.xz", 2**18)
    assert not (tmp_path / "out.tar.xz").exists()


def test_the_convolution_is_compiled_for_some_gpus_alone() -> None:
    flags = [
        f'    cc_flag.append("-gencode")\n    cc_flag.append("arch=compute_{a},code=sm_{a}")\n' for a in (75, 90, 100)
    ]
    setup = f"if True:\n{flags[0]}{flags[1]}if False:\n{flags[2]}"
    assert gpu_bring.only_archs(setup, ["90"]) == f"if True:\n    pass\n{flags[1]}if False:\n    pass\n"
    with pytest.raises(ValueError, match=r"^causal-conv1d's setup\.py does not compile for 110"):
        gpu_bring.only_archs(setup, ["110"])
