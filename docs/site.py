"""What `make docs` adds to mkdocs: pages from the root, files that pages link to, what commands and the HTTP API say.

On the site all pages lie beside each other, whether they come from the root or from `docs/`; links between them are
written as they work in the repository, and lose what leads from one folder to the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import click
import griffe
from fastapi.routing import APIRoute
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from rootstockd.cli import main
from rootstockd.control.api import make_app
from rootstockd.control.limits import REFUSALS

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
    """Links as they are on the site; on the pages of commands and of HTTP what there is of them."""
    if page.file.src_uri == "commands.md":
        markdown += "".join(_help(main, _context(main, "rootstockd")))
    if page.file.src_uri == "http.md":
        markdown += "".join(_http())
    return LINK.sub(r"\1", markdown)


def _help(command: click.Command, context: click.Context) -> Iterator[str]:
    yield f"\n## {context.command_path}\n\n```text\n{command.get_help(context)}\n```\n"
    if isinstance(command, click.Group):
        for name, one in sorted(command.commands.items()):
            yield from _help(one, _context(one, name, context))


def _context(command: click.Command, name: str, parent: click.Context | None = None) -> click.Context:
    """As the command makes it itself, but for its width."""
    return click.Context(command, parent, name, **{**command.context_settings, "max_content_width": 100})


def _http() -> Iterator[str]:
    """The control API's paths, refusals and models, as its code has them."""
    yield "\n| | what for | who may | takes | answer |\n| --- | --- | --- | --- | --- |\n"
    app = make_app(cast(Any, None))  # it asks its daemon when it is asked
    for route in app.routes:
        if isinstance(route, APIRoute):
            yield f"| {' | '.join(_row(route))} |\n"
    yield "\n## Refusals\n\n| status | |\n| --- | --- |\n"
    yield from (f"| {status} | {said['description']} |\n" for status, said in REFUSALS.items())
    yield "\n## Bodies and answers\n"
    for model in griffe.load("rootstockd.control.schema", search_paths=[ROOT]).classes.values():
        if model.is_alias or model.docstring is None:  # what it imports has its own page
            continue
        yield f"\n### {model.name}\n\n{model.docstring.value}\n\n| field | type | |\n| --- | --- | --- |\n"
        for field in model.attributes.values():
            if field.annotation is not None:  # others are for pydantic
                said = " ".join(field.docstring.value.split()) if field.docstring else ""
                yield f"| `{field.name}` | `{field.annotation}` | {said} |\n"


def _row(route: APIRoute) -> Iterator[str]:
    (method,) = route.methods
    yield f"`{method} {route.path}`"
    yield route.description
    yield "administrators" if route.dependencies else "users"
    body = [route.body_field.field_info.annotation] if route.body_field else []
    yield ", ".join([*(f"`?{one.name}=`" for one in route.dependant.query_params), *map(_reference, body)])
    yield _reference(route.response_model) if route.response_model else "" if route.status_code else "text"


def _reference(model: Any) -> str:
    """A model's name, which leads to what is said of it below."""
    if arguments := getattr(model, "__args__", ()):
        return f"list of {_reference(arguments[0])}"
    return f"[{model.__name__}](#{model.__name__.lower()})"
