"""Files are whole: written beside what they replace, and renamed when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def written_beside(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A new name in the same folder; what is written there takes a file's place at the end.

    Whatever goes wrong, a full disk or a kill, the old content is there or the new one, whole.

        with written_beside("results.json") as beside:
            beside.write_text(text)

    Args:
      path: of the file. Where it is a link, what it points to is replaced.

    Raises:
      OSError: it could not be written; what was there is as it was.
    """
    path = Path(path)
    target = path.resolve()
    if target.exists() and not target.is_file():
        raise OSError(f"{path} is no file, but a folder or a device; give another name")
    # With the same ending, which some libraries choose a format by.
    beside = target.with_name(f".{secrets.token_hex(4)}.{target.name}")
    try:
        yield beside
        with beside.open("rb+") as file:  # or a power cut may leave the name without the content
            os.fsync(file.fileno())
        beside.replace(target)
    except OSError as error:
        before = "what was there is as it was" if target.exists() else "nothing is left of it"
        raise OSError(
            f"{path} could not be written ({error.strerror or error}); {before}. Make room, or "
            "give another place"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)


def write_beside(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Writes a file at once: the old content is there or the new one; see `written_beside`."""
    with written_beside(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, line: str) -> None:
    """Adds a line to a file, to the disk, or nothing of it.

    Raises:
      OSError: it could not be written.
    """
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            content = memoryview(line.encode())
            while content:  # where there is little room, a part is written, and then no more
                content = content[file.write(content) or 0 :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise OSError(
                f"{path} could not be written ({error.strerror}); what was there is as it was. "
                "Make room, and go on with the same command"
            ) from error
