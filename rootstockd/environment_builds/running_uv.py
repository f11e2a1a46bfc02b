"""Running uv: its progress goes on to whoever waits, its errors come back with what to do about them."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import uv

from rootstockd.environments.builds import EnvironmentBuildError

_libc = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1
_LAST_LINES = 60
_NOT_OURS = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "UV_COMPILE_BYTECODE", "UV_VENV_SEED")
"""Variables that mean other environments, or have packages run: to compile, uv starts the environment's Python, which
runs what they have for that; and seeds come without a checksum."""
_HINTS = {
    ("No space left", "os error 28", "quota exceeded"): "The disk is full: free some of it, or name other places with "
    "ROOTSTOCKD_STATE and UV_CACHE_DIR.",
    (
        "download.pytorch.org",
    ): "PyTorch's own package index does not answer: `--torch index` takes torch from where the "
    "other packages come from, `--offline` what uv has in its cache.",
    (
        "network connectivity is disabled",
        "network was disabled",
        "not found in the cache",
    ): "uv's cache does not have everything: build once without --offline, or `rootstockd env import` what was "
    "exported on a machine with a network.",
    ("Failed to fetch", "error sending request", "dns error", "timed out"): "The package index does not answer. "
    "`--offline` builds from uv's cache; `rootstockd env import` from what was exported on a machine with a network; "
    "uv's own variables (UV_DEFAULT_INDEX, UV_FIND_LINKS) name a mirror.",
    (
        "Hash mismatch",
    ): "A package is not what the lock says: it was changed since. `rootstockd env update` makes a new lock.",
    (
        "The wheel is invalid",
    ): "A package in uv's cache is damaged, or was built wrongly: `uv cache clean` empties the cache (`python -m uv "
    "cache clean` where uv is in no PATH).",
    ("No solution found", "was not found", "no versions", "has no wheels", "no wheels with a matching"): "Change the "
    "requirements in the specification, or the Python (--python), so that they are compatible.",
}
"""What uv says, and what to do about it."""


@functools.cache
def uv_command() -> str:
    """Where uv is."""
    return uv.find_uv_bin()


def run_uv(
    arguments: Sequence[str | Path],
    doing: str,
    *,
    stdin: str = "",
    variables: dict[str, str] | None = None,
    loud: bool = True,
) -> str:
    """Run uv and give what it prints.

    Args:
        arguments: its arguments; paths are absolute.
        doing: what it does, for the error.
        stdin: what it reads.
        variables: more for its environment.
        loud: pass on what it says meanwhile.

    Raises:
        EnvironmentBuildError: it failed; with the end of what it said.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_OURS}
    with tempfile.TemporaryFile("w+") as output:  # not a pipe, which would have to be read meanwhile
        try:
            process = subprocess.Popen(
                [uv_command(), *map(str, arguments)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd="/",  # uv takes settings from its folder and those above, which may be anybody's
                env={**environment, "UV_NO_PROGRESS": "1", **(variables or {})},
                umask=0o022,  # others shall read what is built
                preexec_fn=end_with_parent,  # noqa: PLW1509 - there are no threads here, and it calls nothing of Python's
            )
        except OSError as error:
            raise EnvironmentBuildError(f"{doing}: uv can't be run: {error}.") from error
        with process:
            try:
                last = _follow(process, stdin, loud=loud)
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            raise EnvironmentBuildError(failure(doing, process.returncode, last))
        output.seek(0)
        return output.read()


def _follow(process: subprocess.Popen[str], stdin: str, *, loud: bool) -> list[str]:
    """Give it what it reads; the last of what it says until it ends. An error is not passed on: it is raised."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    held: list[str] = []
    assert process.stdin is not None and process.stderr is not None
    process.stdin.write(stdin)  # a few lines, which a pipe holds
    process.stdin.close()
    for line in process.stderr:
        last.append(line.rstrip())
        if held or _begins_error(line):
            held.append(line)
        elif loud:
            _pass_on(line)
    if process.wait() == 0 and loud:  # it got on in spite of it
        for line in held:
            _pass_on(line)
    return list(last)


def _pass_on(line: str) -> None:
    print(f"  {line.rstrip()}", file=sys.stderr, flush=True)  # noqa: T201


def _begins_error(line: str) -> bool:
    return line.strip().startswith(("error:", "×"))


def failure(doing: str, status: int, lines: list[str]) -> str:
    """What went wrong, from what uv said, and what to do."""
    begin = next((number for number, line in enumerate(lines) if _begins_error(line)), 0)
    said = (
        "\n  ".join(line for line in lines[begin:] if line.strip())
        or f"it ended with status {status} without a message"
    )
    folded = " ".join(lines[begin:]).replace("│", " ").lower()
    folded = " ".join(folded.split())
    hint = next((hint for words, hint in _HINTS.items() if any(word.lower() in folded for word in words)), "")
    return f"{doing} failed. uv says:\n  {said}" + (f"\n{hint}" if hint else "")


def end_with_parent() -> None:
    """Or a build that nobody waits for any longer would go on."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
