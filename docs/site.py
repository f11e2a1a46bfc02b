"""What `make docs` adds to mkdocs: pages from the root, files that pages link to, and what commands say of themselves.

On the site all pages lie beside each other, whether they come from the root or from `docs/`; links between them are
written as they work in the repository, and lose what leads from one folder to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from rootstockd.cli import main

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
LINK = re.compile(r"(?<=]\()(?:\.\./|docs/)?([^):#]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages of the root, and whatever else is linked to."""
    for name in PAGES:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for page in list(files.documentation_pages()):
        for target in LINK.findall(page.content_string):
            if (ROOT / target).is_file() and files.get_file_from_path(target) is None:
                files.append(File.generated(config, target, abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Links as they are on the site, and on the page of commands what `--help` says of each."""
    if page.file.src_uri == "commands.md":
        markdown += "".join(_help(main, _context(main, "rootstockd")))
    return LINK.sub(r"\1", markdown)


def _help(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name, one in sorted(command.commands.items()):
            yield from _help(one, _context(one, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    """As the command makes it itself, but for its width."""
    return click.Context(command, parent, name, **{**command.context_settings, "max_content_width": 100})
