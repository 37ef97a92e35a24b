"""What mkdocs asks for while it builds the docs site: pages that lie outside docs/, and links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the site and the files that they are made of, both as seen from docs/.
OUTSIDE = {"index.md": "../README.md", "contributing.md": "../CONTRIBUTING.md", "changes.md": "../CHANGELOG.md"}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of ``OUTSIDE``."""
    from mkdocs.structure.files import File

    for page, source in OUTSIDE.items():
        text = (ROOT / "docs" / source).read_text()
        files.append(File.generated(config, page, content=with_links(text, posixpath.dirname(source))))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of a page in docs/."""
    return with_links(markdown, "")


def with_links(text: str, folder: str) -> str:
    """Markdown whose relative links lead to pages of the site.

    Args:
        text: of a file.
        folder: where the file lies, as seen from docs/.
    """
    pages = {source: page for page, source in OUTSIDE.items()}

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, link[1]))
        target = pages.get(target, target)
        return target.removeprefix("../docs/")

    return _LINK.sub(moved, text)
