"""Pages of the site that live outside docs/: benchmark tables, CONTRIBUTING, the changelog."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
OUTSIDE = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}


def _places() -> dict[str, Path]:
    """{page of the site: file outside docs/}."""
    tables = sorted((ROOT / "benchmarks" / "results").glob("*.md"))
    named = {page: ROOT / name for page, name in OUTSIDE.items()}
    return named | {f"results/{path.name}": path for path in tables}


def on_files(files: Any, config: Any) -> Any:
    """Add them."""
    for page, path in _places().items():
        text = _moved(path.read_text(encoding="utf-8"), path, page)
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Lead links that leave docs/ to those pages."""
    source = page.file.src_uri
    return markdown if source in _places() else _moved(markdown, ROOT / "docs" / source, source)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Docstrings name functions as Sphinx does; here the name alone is shown."""
    return re.sub(r":(?:meth|func|class|mod|data|attr):(?=<code>)", "", html)


def _moved(text: str, path: Path, page: str) -> str:
    """Links relative to ``path`` become relative to ``page``; to code, plain text."""
    pages = {file.resolve(): name for name, file in _places().items()}

    def lead(match: re.Match[str]) -> str:
        label, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith(("http", "#")):
            return match[0]
        place = (path.parent / target).resolve()
        inside = ROOT / "docs"
        if place in pages:
            name = pages[place]
        elif place.is_relative_to(inside) and place.is_file():
            name = place.relative_to(inside).as_posix()
        else:
            return f"`{label}`" if "`" not in label else label
        up = "../" * page.count("/")
        return f"[{label}]({up}{name}{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#\s]+)(#[^)\s]*)?\)", lead, text)
