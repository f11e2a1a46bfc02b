"""Input files of programs, from templates: a small part of Mustache, and nothing that could run.

`{{name}}` becomes a value, `{{#section}}...{{/section}}` is repeated for each of a list, with names of its own, and
`{{>name}}` becomes the content of the file whose path the value is. A section's tag alone on its line takes the line
with it. A name that nothing stands behind is an error when the template is read, not when it is used.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from typing import Any, Dict, List, Set, Tuple

from rootstockd.worker.files import open_regular

Context = Dict[str, Any]
"""Values by name; a section's value is a list of such."""
Known = Dict[str, Any]
"""Names that there are: None for a value, those within for a section."""
TEXT: Dict[str, Any] = {"encoding": "utf-8", "errors": "surrogateescape"}
"""How files are read and written: whatever is in one is the same in the other."""

_TAG = re.compile(r"\{\{\s*([#/>]?)\s*(.*?)\s*\}\}", re.DOTALL)
_ALONE = re.compile(r"^[ \t]*(\{\{\s*[#/][^}]*\}\})[ \t]*(?:\r?\n|\Z)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


class TemplateError(ValueError):
    """A template that can't be filled, and why."""


@dataclass(frozen=True)
class _Tag:
    kind: str
    """Empty for a value, `#` for a section, `>` for a file's content."""
    name: str
    body: Tuple[Any, ...] = ()


class Template:
    """One template.

    Args:
        text: what is written.
        known: the names that it may use.

    Raises:
        TemplateError: it uses another, or its sections are not closed as they were opened.
    """

    def __init__(self, text: str, known: Known) -> None:
        self.names: Set[str] = set()
        """All names that it uses."""
        pieces = _TAG.split(_ALONE.sub(r"\1", text))
        self._nodes, _ = self._parse(pieces[0], pieces[1:], [known], "")
        if any("{{" in piece for piece in pieces[::3]):
            raise TemplateError("there is a {{ without its }}")

    def _parse(
        self, text: str, pieces: List[str], scopes: List[Known], section: str
    ) -> Tuple[Tuple[Any, ...], List[str]]:
        """What there is up to the end of `section`, and the pieces behind that."""
        nodes: List[Any] = [text]
        while pieces:
            kind, name, text = pieces[:3]
            pieces = pieces[3:]
            if kind == "/":
                if name != section:
                    opened = f"the section {section!r} is open" if section else "no section is open"
                    raise TemplateError(f"{{{{/{name}}}}} closes what is not open: {opened}")
                return tuple(nodes), [text, *pieces]
            within = _look_up(name, scopes)
            self.names.add(name)
            if (within is None) == (kind == "#"):
                form = f"{{{{{name}}}}}" if within is None else f"{{{{#{name}}}}}...{{{{/{name}}}}}"
                raise TemplateError(f"{{{{{kind}{name}}}}}: it is written {form}")
            if within is None:
                nodes += [_Tag(kind, name), text]
            else:
                body, (text, *pieces) = self._parse(text, pieces, [*scopes, within], name)
                nodes += [_Tag(kind, name, body), text]
        if section:
            raise TemplateError(f"the section {{{{#{section}}}}} has no {{{{/{section}}}}}")
        return tuple(nodes), []

    def fill(self, context: Context) -> str:
        """The text with everything in its place.

        Raises:
            OSError: a file whose content is wanted can't be read.
        """
        return "".join(_fill(node, context) for node in self._nodes)


def _look_up(name: str, scopes: List[Known]) -> Known | None:
    """What a name is, from the inside out.

    Raises:
        TemplateError: there is none such.
    """
    for scope in reversed(scopes):
        if name in scope:
            within: Known | None = scope[name]
            return within
    what = f"{{{{{name}}}}}" if _NAME.fullmatch(name) else repr(name[:50])
    raise TemplateError(f"nothing stands behind {what}; here there are {', '.join(_visible(scopes))}")


def _visible(scopes: List[Known]) -> List[str]:
    return sorted({name for scope in scopes for name in scope})


def _fill(node: Any, context: Context) -> str:
    if isinstance(node, str):
        return node
    value = context[node.name]
    if node.kind == "#":
        return "".join(_fill(inner, {**context, **item}) for item in value for inner in node.body)
    if node.kind == ">":
        with io.TextIOWrapper(open_regular(value), **TEXT) as file:
            return file.read()
    # 17 digits: what is read back is the same number
    return f"{value:.17g}" if isinstance(value, float) else str(value)
