"""What the site has beyond the pages in docs/: pages from elsewhere in the repository, and the help of every command."""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from halfbyte.cli.bench import BENCHMARKS
from halfbyte.cli.main import COMMANDS, main

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "benchmarks/README.md": "benchmarking.md"}
SOURCES = {page: source for source, page in PAGES.items()}
CODE_OR_LINK = re.compile(r"^```.*?^```$|\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", flags=re.DOTALL | re.MULTILINE)
MARKER = "<!-- commands -->"


def on_files(files: Files, *, config: Any) -> Files:
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    source = ROOT / SOURCES.get(place, f"docs/{place}")
    markdown = CODE_OR_LINK.sub(lambda found: _on_the_site(found, source, place), markdown)
    markdown = markdown.replace("```python gpu\n", "```python\n")  # a fence of the site has a language and nothing else
    return markdown.replace(MARKER, _commands()) if MARKER in markdown else markdown


def _on_the_site(found: re.Match[str], source: Path, place: str) -> str:
    """A relative link of the repository as one of the site; a file that the site does not have is named, without a link."""
    text, target, anchor = found.groups()
    if target is None or "://" in target:
        return found[0]
    file = (source.parent / target).resolve().relative_to(ROOT).as_posix()
    page = PAGES.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)
    return f"[{text}]({os.path.relpath(page, Path(place).parent)}{anchor or ''})" if page else text


def _commands() -> str:
    names = sorted([[name] for name in COMMANDS] + [["bench", name] for name in BENCHMARKS])
    return "\n\n".join(f"## halfbyte {' '.join(name)}\n\n```text\n{_help(name)}```" for name in names)


def _help(command: list[str]) -> str:
    os.environ["COLUMNS"] = "84"
    with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
        main([*command, "--help"])
    return text.getvalue()
