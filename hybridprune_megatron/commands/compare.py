"""Puts two analyses on one page: what differs, with intervals, and their figures side by side.

    hybridprune compare runs/demo runs/other
    hybridprune compare runs/demo/analysis runs/demo/analysis_035 --out compared.html

Takes folders that hybridprune analyze wrote, or runs that hold one as analysis/. Analyses of the same clips are
compared clip by clip; others have no intervals.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from hybridprune_megatron.config.one_line import one_line_errors
from hybridprune_megatron.config.outputs import check_file, whole_file
from hybridprune_megatron.engine.quiet import quiet_libraries

COMMAND = "hybridprune compare"


@one_line_errors("compare")
def main(argv: list[str]) -> None:
    """Reads the command line and the analyses; a wrong folder ends it with one line and code 2."""
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("analyses", nargs=2, type=Path, metavar="folder", help="of an analysis, or of an analysed run")
    parser.add_argument("--out", type=Path, default=Path("compared.html"), help="page to write (default: %(default)s)")
    options = parser.parse_args(argv)
    out: Path = options.out
    if out.suffix != ".html":
        raise ValueError(f"--out={out}: a page is a .html; give such a name")
    if not out.parent.is_dir():
        raise ValueError(f"--out={out}: its folder is not there; make it, or give another")
    check_file(out, COMMAND, "--out")
    for folder in options.analyses:
        if not folder.is_dir():
            raise ValueError(f"{folder}: is not a folder (looked from {Path.cwd()}); give one of hybridprune analyze")
    quiet_libraries()
    from hybridprune_megatron.analysis.compare import compare, read_analysis

    (folder_a, a), (folder_b, b) = map(read_analysis, options.analyses)
    page, clips = compare((folder_a, folder_b), (a, b), COMMAND)
    with whole_file(out) as scratch:
        scratch.write_text(page)
    print(f"{out}: {folder_a} and {folder_b}, {clips} clips in common")
