"""Published files over HTTP: resumed, retried, checked by SHA-256, complete or absent; or downloaded by hand by the
user.
"""

import html
import http.client
import os
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator
from http.cookiejar import CookieJar
from pathlib import Path
from typing import NamedTuple

from s2dm_jax.common.errors import UserError
from s2dm_jax.common.file_kinds import kind_of_file
from s2dm_jax.common.files import flush_to_disk
from s2dm_jax.common.hashing import digest_of_file
from s2dm_jax.common.progress import progress_bar

# Seconds without a byte, and before each new try; what was downloaded meanwhile begins the tries again.
_TIMEOUT = 30.0
_WAITS = (1.0, 2.0, 4.0)
_CHUNK = 1 << 18
_MAX_PAGE = 1 << 20
_TRANSIENT_STATUS = (408, 425, 429)


class RemoteFile(NamedTuple):
    """A published file: its name on disk, URL, bytes and SHA-256."""

    name: str
    url: str
    size: int
    sha256: str


# Of a mirror: its own sizes and SHA-256, in the format of tensorflow-datasets.
_CHECKSUMS = "checksums.tsv"


class _FinalError(Exception):
    """Why a download cannot succeed."""


class _TransientError(Exception):
    """Why a download has failed that may succeed when tried again."""


def mirrored(files: Iterable[RemoteFile]) -> list[RemoteFile]:
    """The files with their URLs at $S2DM_JAX_MIRROR, a folder of them on a web server, if that is set.

    A checksums.tsv there, with lines of URL, bytes, SHA-256 and name, replaces the published sizes and checksums.
    """
    files, mirror = list(files), os.environ.get("S2DM_JAX_MIRROR", "").rstrip("/")
    if not mirror or not files:
        return files
    if not re.match("https?://", mirror):
        raise UserError(f"S2DM_JAX_MIRROR={mirror} is not a URL; it must begin with http:// or https://")
    try:
        with _open(urllib.request.build_opener(), f"{mirror}/{_CHECKSUMS}", 0) as response:
            text = b"".join(_chunks(response)).decode(errors="replace")
    except (_FinalError, _TransientError):
        text = ""
    lines = re.findall(r"^\S+\t(\d+)\t([0-9a-f]{64})\t(\S+)$", text, re.MULTILINE)
    own = {name: (int(size), sha256) for size, sha256, name in lines}
    found = [RemoteFile(f.name, f"{mirror}/{f.name}", *own.get(f.name, (f.size, f.sha256))) for f in files]
    if others := [file.name for file, other in zip(files, found, strict=True) if file.sha256 != other.sha256]:
        print(
            f"note: {mirror} has its own version of {', '.join(others)}, different from the published one",
            file=sys.stderr,
        )
    return found


def fetch_files(title: str, files: Iterable[RemoteFile], folder: Path, by_hand: Path) -> None:
    """Puts every file into `folder`, complete: a link to one that the user put into `by_hand`, or a download.

    An interrupted download is resumed.

    Args:
      title: of the dataset, for errors.

    Raises:
      UserError: if a file cannot be downloaded, or the user's is a different one; it says what to put where.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        target, own = folder / file.name, by_hand / file.name
        if own.exists():
            if fault := why_not(own, file):
                raise UserError(
                    f"{own} is not the published {file.name} of {title} ({fault}); get it again from {file.url}, or "
                    "remove it to have it downloaded"
                )
            target.unlink(missing_ok=True)
            target.symlink_to(own.resolve())
        elif not target.exists() or why_not(target, file):
            # Also a link whose file has gone.
            target.unlink(missing_ok=True)
            try:
                _download(file, target)
            except (_FinalError, _TransientError) as error:
                raise UserError(
                    f"{file.name} of {title} cannot be downloaded ({error}); download {file.url} with a browser, put "
                    f"it at {own}, and run the same command again"
                ) from error


def why_not(path: Path, file: RemoteFile) -> str:
    """Why a file on disk is not the published one, "" if it is."""
    size = path.stat().st_size
    if kind := kind_of_file(path):
        return kind
    if size != file.size:
        return f"it has {size:,} bytes, not {file.size:,}"
    digest = digest_of_file(path)
    return "" if digest == file.sha256 else f"its SHA-256 is {digest[:16]}…, not {file.sha256[:16]}…"


def _download(file: RemoteFile, target: Path) -> None:
    part = target.with_name(f".{target.name}.part")
    print(f"downloading {file.url} ({file.size / 1e6:,.1f} MB)", flush=True)
    resumed = _size(part) > 0
    _download_part(file, part)
    if resumed and why_not(part, file):
        # What was there before may be of another version.
        part.unlink()
        _download_part(file, part)
    if fault := why_not(part, file):
        part.unlink()
        raise _FinalError(fault)
    flush_to_disk(part)
    os.replace(part, target)
    flush_to_disk(target.parent)


def _download_part(file: RemoteFile, part: Path) -> None:
    """Downloads what `part` lacks, with as many new tries as `_WAITS` between two successes."""
    failures = 0
    with progress_bar(file.size, "bytes", done=_size(part)) as advance:
        while (before := _size(part)) < file.size:
            try:
                for more in _append(file, part):
                    advance(more)
                if _size(part) < file.size:
                    raise _TransientError(f"it ends after {_size(part):,} of {file.size:,} bytes")
            except _TransientError:
                failures = 0 if _size(part) > before else failures + 1
                if failures > len(_WAITS):
                    raise
                time.sleep(_WAITS[max(failures - 1, 0)])


def _append(file: RemoteFile, part: Path) -> Iterator[int]:
    """Appends what the server gives from the end of `part` on; yields by how many bytes `part` has grown."""
    start = _size(part)
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    response = _open(opener, file.url, start)
    with response:
        partial = response.status == http.HTTPStatus.PARTIAL_CONTENT
        chunks = _chunks(response)
        first = next(chunks, b"")
        if not partial and first.lstrip()[:1] == b"<":
            page = first + b"".join(chunks)
            response.close()
            response = _open(opener, _confirmed_url(file.url, page[:_MAX_PAGE].decode(errors="replace")), 0)
            chunks = _chunks(response)
            first = next(chunks, b"")
            if first.lstrip()[:1] == b"<":
                raise _FinalError(_describe_page(first.decode(errors="replace")))
        with response, part.open("ab" if partial else "wb") as output:
            if start and not partial:
                yield -start
            while first:
                output.write(first)
                if output.tell() > file.size:
                    output.truncate(0)
                    raise _FinalError(f"it has more than {file.size:,} bytes")
                yield len(first)
                first = next(chunks, b"")


def _open(opener: urllib.request.OpenerDirector, url: str, start: int) -> http.client.HTTPResponse:
    """The server's answer to a request for a file from byte `start` on."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        return opener.open(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        with error:
            page = _read_page(error)
        if "quota" in page.lower():
            raise _FinalError(_describe_page(page)) from error
        if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _FinalError(f"the server's file ends after {start:,} bytes") from error
        kind = _TransientError if error.code >= 500 or error.code in _TRANSIENT_STATUS else _FinalError
        raise kind(f"the server answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _TransientError(_describe_failure(error)) from error


def _chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        while chunk := response.read(_CHUNK):
            yield chunk
    except (OSError, http.client.HTTPException) as error:
        raise _TransientError(_describe_failure(error)) from error


def _read_page(error: urllib.error.HTTPError) -> str:
    try:
        return error.read(_MAX_PAGE).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return ""


def _describe_failure(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    if isinstance(reason, TimeoutError):
        return f"no answer for {_TIMEOUT:g} s"
    return f"no connection: {getattr(reason, 'strerror', None) or str(reason) or type(reason).__name__}"


def _confirmed_url(url: str, page: str) -> str:
    """Where the button leads on Google Drive's page that it "can't scan this file for viruses"."""
    form = re.search(r'<form[^>]*id="download-form".*?</form>', page, re.DOTALL)
    action = form and re.search(r'action="([^"]+)"', form[0])
    if not form or not action:
        raise _FinalError(_describe_page(page))
    inputs = dict(re.findall(r'<input[^>]*name="([^"]+)"[^>]*value="([^"]*)"', form[0]))
    query = urllib.parse.urlencode({name: html.unescape(value) for name, value in inputs.items()})
    target = urllib.parse.urljoin(url, html.unescape(action[1]))
    return f"{target}{'&' if '?' in target else '?'}{query}" if query else target


def _describe_page(page: str) -> str:
    if re.search(r"quota|too many users", page, re.IGNORECASE):
        return "Google Drive's download quota for this file is used up for today"
    return "the answer is a web page, such as the login page of a network"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
