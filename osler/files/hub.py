"""Files of a dataset on the Hugging Face hub, read by ranges of bytes; the only file that imports ``huggingface_hub``.

Every range is its own request, which the library repeats after a cut connection, a 5xx, or a 429 (after the wait that Retry-After
asks for), so reading continues where it stopped. The revision is resolved to a commit once, and all is read from that commit.
The token comes from HF_TOKEN or `hf auth login`, the server from HF_ENDPOINT.
"""

import contextlib
import errno
import functools
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from typing_extensions import Buffer

from osler.files.find import ROW_ENDINGS, TEXT_ENDINGS, shown
from osler.files.parts import File, find_local
from osler.runtime.errors import UserError

RANGE_BYTES = 1 << 20  # one request asks for at least this many
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
RETRIES, LONGEST_SECONDS = 12, 60  # a request's retries, and the longest wait: waits double up to it, in all seven minutes


@dataclass(frozen=True)
class HubFile:
    """A file of a commit of a dataset; `stamp` identifies its content."""

    repo: str
    commit: str
    path: str
    size: int
    stamp: str

    @property
    def name(self) -> str:
        """Return repository and path."""
        return f"{self.repo}/{self.path}"

    def open(self) -> io.BufferedReader:
        """Open the file for reading at any position."""
        return io.BufferedReader(_Ranges(self), RANGE_BYTES)

    def check(self) -> None:
        """Do nothing: a commit never changes."""


class _Ranges(io.RawIOBase):
    """A file of the hub as a stream of ranges."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._file.size}[whence]
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        stop = min(self._file.size, self._place + len(view))
        if self._place >= stop:
            return 0
        data = _fetch(self._file, self._place, stop)
        view[: len(data)] = data
        self._place += len(data)
        return len(data)


def _fetch(file: HubFile, start: int, stop: int) -> bytes:
    """Return the bytes from `start` up to but without `stop` of a file; raises UserError when the hub does not give them."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = hf_hub_url(file.repo, file.path, repo_type="dataset", revision=file.commit)
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with _explained(file.repo, file.name):
        response = http_backoff(
            "GET", url, headers=headers, follow_redirects=True, timeout=60, max_retries=RETRIES, max_wait_time=LONGEST_SECONDS
        )
        hf_raise_for_status(response)
    data = bytes(response.content)
    if response.status_code != 206:  # a server that knows no ranges sends the whole file
        data = data[start:stop]
    if len(data) != stop - start:
        raise UserError(
            f"{file.name}: the server sent {len(data):,} bytes instead of {stop - start:,}. Run the same command again."
        )
    return data


@functools.cache  # the files are asked for several times before they are read
def hub_files(repo: str, patterns: tuple[str, ...], revision: str) -> tuple[str, list[File]]:
    """Return the commit of a revision of a dataset, and its files that match a pattern, sorted by name.

    Raises UserError when the dataset is not there, not allowed or not reachable, or when no file matches.
    """
    api = _api(repo)
    with _explained(repo):
        commit = str(api.dataset_info(repo, revision=revision).sha)
        tree = api.list_repo_tree(repo, recursive=True, revision=commit, repo_type="dataset")
        found = [entry for entry in tree if hasattr(entry, "size")]  # the others are folders
    files: list[File] = [
        HubFile(repo, commit, entry.path, entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id)
        for entry in sorted(found, key=lambda entry: str(entry.path))
        if any(fnmatchcase(entry.path, pattern) for pattern in patterns)
    ]
    if not files:
        raise UserError(f"{repo} at {revision} has no file {' or '.join(patterns)}, but {len(found):,} others.")
    return commit, files


@functools.cache
def snapshot(repo: str, patterns: tuple[str, ...], revision: str) -> tuple[str, list[File]]:
    """Return the same as `hub_files`, after downloading the files that are not on the disk yet: for many small files."""
    api = _api(repo)
    with _explained(repo):
        commit = str(api.dataset_info(repo, revision=revision).sha)
        folder = api.snapshot_download(repo, repo_type="dataset", revision=commit, allow_patterns=list(patterns))
    return commit, find_local(folder, (*ROW_ENDINGS, *TEXT_ENDINGS), repo)


def _api(repo: str) -> Any:
    try:
        from huggingface_hub import HfApi
    except ImportError:
        remedy = "pip install -e '.[hub]' in Osler's source tree."
        raise UserError(f"Reading {repo} from the hub needs huggingface_hub: {remedy}") from None
    return HfApi()


@contextlib.contextmanager
def _explained(repo: str, name: str = "") -> Iterator[None]:
    """Turn the library's errors into a UserError that says what to do and names the file that was being read, if any."""
    from huggingface_hub import constants, errors

    name = name or repo
    local = (
        "or name local files of the same schema: data.path=DIR or data.root=DIR of a run, and of `osler eval` task=TYPE:FILE "
        "(such as task=medqa:FILE) or root=DIR with a folder for each exam in it"
    )
    try:
        yield
    except errors.OfflineModeIsEnabled:
        fetch = f"hf download {repo} --repo-type dataset --local-dir DIR"
        told = f"{name} is read from the hub, but HF_HUB_OFFLINE is set: unset it, fetch it elsewhere (`{fetch}`), {local}."
    except errors.GatedRepoError:
        told = f"{repo} asks for consent: accept its terms on its page and set HF_TOKEN, {local}."
    except errors.RevisionNotFoundError:
        told = f"{repo} has no such revision; set another `revision`."
    except errors.RepositoryNotFoundError:
        told = f"{repo} is not on the hub, or is private: set HF_TOKEN to a token that may read it, {local}."
    except errors.HfHubHTTPError as error:
        told = f"{name} cannot be read from the hub: {' '.join(str(error).split())}. Run the same command again, {local}."
    except (errors.HTTPError, OSError) as error:
        told = f"{name} cannot be reached: {error}. Run the same command again when the network is back, {local}."
        if isinstance(error, OSError) and (error.filename or error.errno in _DISK_ERRORS):
            place = shown(error.filename or constants.HF_HUB_CACHE)
            told = (
                f"{name} cannot be kept on this machine, at {place}: {error.strerror}. Free some of the disk, or set HF_HOME to "
                f"a folder on another, and run the same command again, {local}."
            )
    else:
        return
    raise UserError(told) from None
