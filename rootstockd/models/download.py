"""Getting a file over HTTP into a part file that a later call goes on with, whatever ended the earlier one.

Beside the part file lies a note of where it comes from and of which version it is (ETag or Last-Modified). A server is
asked for the rest of that very version (Range with If-Range); one that has another, or that knows no ranges, sends all
of it, and then the part is written anew. Nothing here says that the bytes are the right ones: the caller hashes them.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests
from pydantic import BaseModel, ValidationError

import rootstockd
from rootstockd.models.store import LARGEST
from rootstockd.models.whole_files import no_room
from rootstockd.worker.failures import disk_full
from rootstockd.worker.files import read_regular

BLOCK = 1 << 14
"""Bytes at a time: what came of a block that was cut off is lost."""
ATTEMPTS = 6
"""In a row without a byte more, until it is given up."""
TIMEOUT = (15.0, 60.0)
"""Seconds to connect, and to wait for the next bytes."""
LONGEST_PAUSE = 30.0
_SERVER_ERROR = 500
_WAYS = (
    "Try again later. Where the internet is behind a proxy, https_proxy has to name it; with --mirror the file can "
    "come from elsewhere."
)
Progress = Callable[[int, "int | None"], None]
"""Told how many bytes there are, and how many there will be, where that is known."""
Say = Callable[[str], None]
"""Told what people should know meanwhile."""


@dataclass(frozen=True)
class Known:
    """What the caller knows of the right file.

    Args:
        checksum: whether the right bytes can be told by it.
        size: how many bytes it has, where that is known.
    """

    checksum: bool
    size: int | None = None


class DownloadError(Exception):
    """A file that can't be had: which, why, and what to do now."""


class _Again(Exception):
    """It failed in a way that may pass.

    Args:
        why: how.
        pause: seconds that the server asked for.
    """

    def __init__(self, why: str, pause: float = 0.0) -> None:
        super().__init__(why)
        self.pause = pause


class _Origin(BaseModel):
    """What a part file is part of."""

    url: str
    version: str
    """A strong ETag or a Last-Modified, for If-Range; empty where the server gave neither."""
    total: int | None = None
    """Bytes of the whole file, where the server said it."""


class _Session(requests.Session):
    """Goes where it is sent, but never on from https to http."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target and resp.url.startswith("https:") and not (to := urljoin(resp.url, target)).startswith("https:"):
            raise DownloadError(
                f"{resp.url} leads to {to}, which anybody on the way could change. Nothing was downloaded."
            )
        return target


@dataclass
class _Part:
    """The part file, and the note beside it."""

    path: Path

    @property
    def note(self) -> Path:
        return self.path.with_name(self.path.name + ".from")

    @property
    def size(self) -> int:
        with contextlib.suppress(FileNotFoundError):
            return self.path.stat().st_size
        return 0

    def origin(self, url: str) -> _Origin:
        """Where what is there of `url` came from; without a version where that can't be gone on with."""
        try:
            origin = _Origin.model_validate_json(read_regular(self.note))
        except (OSError, ValidationError):
            return _Origin(url=url, version="")
        return origin if origin.url == url and self.size else _Origin(url=url, version="")

    def begin(self, origin: _Origin) -> None:
        """Note what comes now; nothing of it is there. The order keeps old bytes from passing for new ones."""
        self.note.unlink(missing_ok=True)
        # whoever reads a named pipe that lies there is not waited for
        os.close(os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NONBLOCK, 0o666))
        self.note.write_text(origin.model_dump_json())

    def discard(self) -> None:
        self.note.unlink(missing_ok=True)
        self.path.unlink(missing_ok=True)


def download(
    url: str,
    path: Path,
    known: Known,
    *,
    progress: Progress,
    say: Say,
    pause: float = 1.0,
    timeout: tuple[float, float] = TIMEOUT,
) -> None:
    """Have all of `url` in `path`, beginning with what is there of it already.

    Args:
        url: what to get.
        path: the part file. The caller holds a lock on it, and renames or removes it.
        known: of the right file. No more bytes are written than it has, or than LARGEST; and where its checksum is not
            known, the server has to say how many there are.
        progress: told of each block.
        say: told of each failure that is waited out.
        pause: seconds until the first new attempt; doubled for each further one.
        timeout: seconds to connect, and to wait for the next bytes.

    Raises:
        DownloadError: it can't be had. What came of it stays in `path` if a later call may go on with it.
    """
    part = _Part(path)
    failures, before = 0, part.size
    with _Session() as session:
        session.headers["User-Agent"] = f"rootstockd/{rootstockd.__version__}"
        while True:
            try:
                _attempt(session, url, part, known, timeout, progress)
                part.note.unlink(missing_ok=True)
                return
            except _Again as error:
                failures = 1 if part.size > before else failures + 1
                before = max(before, part.size)  # a server without ranges begins anew each time
                if failures >= ATTEMPTS:
                    kept = f"{part.size} bytes are kept, and the next attempt goes on from there. Try again later."
                    raise DownloadError(
                        f"{url} can't be downloaded: {error}. {kept if part.size else _WAYS}"
                    ) from error
                wait = min(max(error.pause, pause * 2 ** (failures - 1)), LONGEST_PAUSE)
                say(f"{error}; trying again in {wait:.1f} s")
                time.sleep(wait * random.uniform(0.8, 1.2))  # noqa: S311 - not a secret
            except OSError as error:  # what requests raises was dealt with
                if disk_full(error):
                    raise _no_room(path.parent) from error
                raise DownloadError(f"{path} can't be written: {error.strerror}.") from error


def _attempt(
    session: requests.Session,
    url: str,
    part: _Part,
    known: Known,
    timeout: tuple[float, float],
    progress: Progress,
) -> None:
    """One request, and all of its body.

    Raises:
        _Again: it failed, and may not fail the next time.
        DownloadError: it will fail again.
    """
    headers = {"Accept-Encoding": "identity"}  # a range of a compressed body is no range of the file
    origin = part.origin(url)
    if origin.version:
        headers |= {"Range": f"bytes={part.size}-", "If-Range": origin.version}
    try:
        with session.get(url, headers=headers, stream=True, timeout=timeout) as response:
            _check(response, url, part)
            if response.status_code == requests.codes.requested_range_not_satisfiable:
                if _total(response) == part.size and origin.total in {None, part.size}:
                    return
                part.discard()
                raise _Again("the part that was there is longer than the file")
            encoded = response.headers.get("Content-Encoding", "identity").lower() != "identity"
            total = _total(response)
            if response.status_code == requests.codes.partial_content:
                total = _check_range(response, part, origin, encoded=encoded, checksum_known=known.checksum)
            else:
                if total is None and not known.checksum and "chunked" not in _transfer(response):
                    raise DownloadError(
                        f"{url}: the server does not say how long the file is, so it could not be told whether all of "
                        "it came. Give its checksum with --sha256."
                    )
                part.begin(_Origin(url=url, version="" if encoded else _version(response), total=total))
            total = None if encoded else total
            _check_size(part, url, total, known.size)
            if not _receive(response, part, total, progress, limit=known.size or LARGEST):
                raise _too_large(part, url, known.size)
    except requests.exceptions.SSLError as error:
        raise _without_tls(url, error) from error
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.TooManyRedirects) as error:
        raise DownloadError(f"{url}: {error}") from error
    except requests.RequestException as error:
        raise _Again(_reason(error)) from error


def _without_tls(url: str, error: requests.exceptions.SSLError) -> DownloadError | _Again:
    """What is to be said, or done, where a connection can't be encrypted: it may only have been broken off."""
    if "certificate" in str(error).lower():
        return DownloadError(f"{url}: its certificate is not accepted: {error}")
    return _Again(_reason(error))


def _check_range(
    response: requests.Response, part: _Part, origin: _Origin, *, encoded: bool, checksum_known: bool
) -> int | None:
    """Whether it is what was asked for, the rest of the same file; its whole length, if anything says it.

    Raises:
        _Again: it is not, and all of the file is to be asked for.
    """
    total = _total(response)
    begins = re.match(rf"bytes {part.size}-", response.headers.get("Content-Range", ""))
    if not origin.version or encoded or not begins or origin.total not in {None, total or origin.total}:
        part.discard()
        raise _Again("the server sent another part than was asked for")
    total = total or origin.total
    if total is None and not checksum_known:
        part.discard()
        raise _Again("the server does not say how long the file is")
    return total


def _receive(response: requests.Response, part: _Part, total: int | None, progress: Progress, *, limit: int) -> bool:
    """Write what comes; False if that is more than `limit`."""
    size = part.size
    progress(size, total)
    with part.path.open("ab", buffering=0) as file:
        for block in response.iter_content(BLOCK):
            if size + len(block) > limit:
                return False
            written = 0
            while written < len(block):  # a disk that is almost full takes some of it
                written += file.write(block[written:])
            size += len(block)
            progress(size, total)
    if total is not None and size != total:
        if size > total:
            part.discard()
        raise _Again(f"the connection ended after {size} of {total} bytes")
    return True


def _check(response: requests.Response, url: str, part: _Part) -> None:
    """Whether it is an answer to go on with."""
    status = response.status_code
    if status in {408, 425, 429} or status >= _SERVER_ERROR:
        after = response.headers.get("Retry-After", "")
        raise _Again(f"the server says {status} {response.reason}", float(after) if after.isdecimal() else 0.0)
    if status not in {200, 206, 416}:
        hint = "Its address may have changed, or a proxy is in the way." if status != requests.codes.not_found else ""
        raise DownloadError(
            f"{url}: the server says {status} {response.reason}. {hint or 'There is no such file any more.'} "
            "With --mirror the file can come from elsewhere."
        )
    if response.headers.get("Content-Type", "").startswith("text/html"):
        part.discard()
        raise DownloadError(f"{url}: a web page came in place of the file; a proxy or a login may be in the way.")


def _check_size(part: _Part, url: str, total: int | None, size: int | None) -> None:
    """Whether a file of so many bytes can be the one that is meant, and has room."""
    if size is not None and total not in {None, size}:
        part.discard()
        raise DownloadError(f"{url} is not the file that is meant: it has {total} bytes, where {size} were expected.")
    if size is None and (total or 0) > LARGEST:
        raise _too_large(part, url, size)
    needed = (total or size or 0) - part.size
    if needed > shutil.disk_usage(part.path.parent).free:
        raise _no_room(part.path.parent, needed)


def _too_large(part: _Part, url: str, size: int | None) -> DownloadError:
    part.discard()
    most = f"the {size} bytes that were expected" if size is not None else f"{LARGEST >> 30} GiB, as no model has"
    return DownloadError(f"{url} is not the file that is meant: it has more than {most}. It was not kept.")


def _no_room(folder: Path, needed: int | None = None) -> DownloadError:
    return DownloadError(f"{no_room(folder, needed)} What has come is kept: make room and pull again.")


def _total(response: requests.Response) -> int | None:
    """The size of the whole file, if the answer says it."""
    if found := re.search(r"/(\d+)$", response.headers.get("Content-Range", "")):
        return int(found[1])
    length = response.headers.get("Content-Length", "")
    return int(length) if response.status_code == requests.codes.ok and length.isdecimal() else None


def _transfer(response: requests.Response) -> str:
    return response.headers.get("Transfer-Encoding", "").lower()


def _version(response: requests.Response) -> str:
    """What tells this version of the file from others, byte by byte; empty where nothing does."""
    etag = response.headers.get("ETag", "")
    if etag and not etag.startswith("W/"):
        return etag
    return "" if etag else response.headers.get("Last-Modified", "")


def _reason(error: requests.RequestException) -> str:
    """The innermost cause, which is what people can do something about."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__ or getattr(cause, "reason", None)) is not None:
        if not isinstance(inner, BaseException):
            break
        cause = inner
    if isinstance(cause, socket.gaierror):
        proxied = isinstance(error, requests.exceptions.ProxyError)
        host = urlsplit(str(error.request.url)).hostname if error.request else ""
        name = "the proxy's name" if proxied else f"the name {host}"
        return f"{name} can't be looked up: {cause.strerror}"
    text = str(cause) or type(cause).__name__
    return text.removesuffix(".") if not isinstance(cause, OSError) or not cause.errno else os.strerror(cause.errno)
