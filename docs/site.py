"""What `make docs` adds to mkdocs: pages that lie at the repository's root, and files that pages link to.

On the site all pages lie beside each other, whether they come from the root or from `docs/`; links between them are
written as they work in the repository, and lose what leads from one folder to the other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

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
    """Links as they are on the site."""
    del page
    return LINK.sub(r"\1", markdown)
