"""Write the manual pages in man1/ from the command itself: `make man`.

They are kept in the repository, so that a wheel can be built without what the daemon needs; a test compares them with
the command.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import rootstockd
from rootstockd.cli import main

FOLDER = Path(__file__).parent / "man1"

FILES = {
    "/run/rootstockd/rootstockd.sock, $XDG_RUNTIME_DIR/rootstockd/rootstockd.sock": "The session sockets of a daemon "
    "that root started, and of a user's own; without XDG_RUNTIME_DIR the latter is in /tmp/rootstockd-UID. The control "
    "socket, rootstockd.control, lies beside it.",
    "/etc/rootstockd, ~/.config/rootstockd": "What the site and the user have set: config.toml, the settings of "
    "daemons; models.toml, a catalogue of further models; environments/NAME.toml, specifications of "
    "environments.",
    "/var/lib/rootstockd, ~/.local/share/rootstockd": "State: weights that were pulled and added, and environments. "
    "Root's is for all users to read.",
    "~/.cache/rootstockd": "What was compiled for models.",
    "/var/log/rootstockd/rootstockd.log, ~/.local/state/rootstockd/log": "Logs of daemons that systemd does not run.",
}
ENVIRONMENT = {
    "ROOTSTOCKD_SOCKET": "The session socket of the daemon to talk to; no other is looked for then.",
    "ROOTSTOCKD_CONFIG": "A file of settings for `rootstockd start`, in place of the site's and the user's.",
    "ROOTSTOCKD_MAX_ATOMS, ROOTSTOCKD_LIMITS__SESSIONS, ...": "Settings: `rootstockd config show` has their names.",
    "ROOTSTOCKD_STATE": "The one state directory to use, such as a cluster's shared one.",
    "ROOTSTOCKD_SITE": "The site's folder of settings in place of /etc/rootstockd.",
    "ROOTSTOCKD_MIRROR": "Where `rootstockd models pull` gets files from.",
    "ROOTSTOCKD_PATIENCE": "Seconds that jobs wait for a daemon that has gone; read by their clients.",
    "CUDA_VISIBLE_DEVICES": "The GPUs that a daemon sees when it starts.",
    "XDG_RUNTIME_DIR, XDG_CONFIG_HOME, XDG_DATA_HOME, XDG_CACHE_HOME, XDG_STATE_HOME": "As the XDG Base Directory "
    "Specification has them.",
}
EXIT_STATUS = {
    "0": "It was done.",
    "1": "It could not be done; standard error says why, and what to do now.",
    "2": "The command line is wrong.",
}
OWN_EXIT_STATUS = {
    "doctor": {"0": "Nothing is wrong, or nothing worse than a warning.", "1": "Something will not work."},
    "slurm run": {"any": "The command's own, if it was run; 128 and the number of the signal that ended it."},
    "attach": {"128+N": "Signal N ended it."},
}


def pages() -> Iterator[tuple[str, str]]:
    """All pages: file names and texts."""
    yield from _pages(main, ["rootstockd"], None)


def _pages(command: click.Command, path: list[str], parent: click.Context | None) -> Iterator[tuple[str, str]]:
    ctx = click.Context(command, parent, path[-1], **command.context_settings)
    yield f"{'-'.join(path)}.1", _page(command, path, ctx)
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            yield from _pages(command.commands[name], [*path, name], ctx)


def _page(command: click.Command, path: list[str], ctx: click.Context) -> str:
    name = "-".join(path)
    arguments = [piece for parameter in command.params for piece in parameter.get_usage_pieces(ctx)]
    options = " [OPTIONS]" if path[1:] and len(command.params) > len(arguments) else ""
    pieces = [piece for piece in command.collect_usage_pieces(ctx) if piece != command.options_metavar]
    rest = " COMMAND ..." if isinstance(command, click.Group) else "".join(f" {piece}" for piece in pieces)
    lines = [
        '.\\" Written by docs/man/generate.py from the command itself.',
        f'.TH {name.upper()} 1 "" "rootstockd {rootstockd.__version__}" "rootstockd"',
        ".SH NAME",
        f"{name} \\- {_marked(_first_sentence(command))}",
        ".SH SYNOPSIS",
        f".B {_escaped(' '.join(path))}",
        _escaped(f"{options}{rest}".strip()),
        ".SH DESCRIPTION",
        *_description(command),
    ]
    if isinstance(command, click.Group):
        lines.append(".SH COMMANDS")
        for sub in command.list_commands(ctx):
            lines += _item(f"{name}-{sub}(1)", _first_sentence(command.commands[sub]))
    lines.append(".SH OPTIONS")
    for parameter in command.get_params(ctx):
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)):
            lines += _item(*record)
    status = EXIT_STATUS | OWN_EXIT_STATUS.get(" ".join(path[1:]), {})
    if len(path) == 1:
        lines += [*_section("FILES", FILES), *_section("ENVIRONMENT", ENVIRONMENT)]
    else:
        named = {str(parameter.envvar) for parameter in command.params if parameter.envvar}
        lines += _section("ENVIRONMENT", {key: text for key, text in ENVIRONMENT.items() if key in named})
    lines += _section("EXIT STATUS", status)
    lines += [".SH SEE ALSO", ".nh", *_see_also(command, path, ctx)]
    return "\n".join(line for line in lines if line) + "\n"


def _first_sentence(command: click.Command) -> str:
    first = inspect.cleandoc(command.help or "").split("\n\n")[0].replace("\n", " ").rstrip(".")
    return first if first.startswith("Python") else first[:1].lower() + first[1:]


def _description(command: click.Command) -> list[str]:
    """The help's paragraphs; those that click leaves as they stand, too."""
    lines = []
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        literal = paragraph.startswith("\b")
        text = [_marked(line) for line in paragraph.removeprefix("\b\n").splitlines()]
        lines += [".PP", ".nf", *text, ".fi"] if literal else [".PP", *text]
    return lines[1:]


def _section(heading: str, items: dict[str, str]) -> list[str]:
    """A list; nothing if there is nothing in it."""
    return [f".SH {heading}", *(line for key, text in items.items() for line in _item(key, text))] if items else []


def _item(key: str, text: str) -> list[str]:
    return [".TP", f".B {_escaped(key)}", _marked(text)]


def _see_also(command: click.Command, path: list[str], ctx: click.Context) -> Iterator[str]:
    """Pages beside and above this one."""
    names = [] if len(path) == 1 else ["-".join(path[:-1])]
    if ctx.parent is not None and isinstance(ctx.parent.command, click.Group):
        names += ["-".join([*path[:-1], name]) for name in ctx.parent.command.commands if name != path[-1]]
    elif isinstance(command, click.Group):
        names += [f"{path[0]}-{name}" for name in command.commands]
    for name in names[:-1]:
        yield f".BR {_escaped(name)} (1),"
    yield f".BR {_escaped(names[-1])} (1)"


def _marked(text: str) -> str:
    """Text with what is in backticks in bold."""
    return re.sub(r"`([^`]*)`", r"\\fB\1\\fR", _escaped(text))


def _escaped(text: str) -> str:
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    written = dict(pages())
    for old in FOLDER.glob("*.1"):
        if old.name not in written:
            old.unlink()
    for name, text in written.items():
        (FOLDER / name).write_text(text)
    sys.stdout.write(f"{len(written)} pages in {FOLDER}\n")
