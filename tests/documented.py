"""Entries that docs/programs.md shows, for tests that run them as they stand there."""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PAGE = Path(__file__).parent.parent / "docs/programs.md"


def documented(name, **replaced):
    """An entry.

    Args:
        name: the model's.
        replaced: arguments to have in place of those that name what lies where on somebody's machine.
    """
    for block in re.findall(r"^```toml\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        if name in (entries := tomllib.loads(block)):
            entry = entries[name]
            return {**entry, "arguments": {**entry["arguments"], **replaced}}
    raise LookupError(name)
