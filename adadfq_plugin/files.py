"""Writing files so that a reader never meets half of one."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from adadfq_plugin.errors import OutputError

__all__ = ["atomic_file", "atomic_folder", "check_file", "check_folder"]


@contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of ``path`` to write to; it takes its place when the ``with`` ends well.

    Args:
        path: the file to write, or a link to it; its folder is made if it isn't there.

    Yields:
        The temporary file's path. It is removed when the ``with`` ends with an exception.

    Raises:
        OutputError: the operating system refuses; the message names ``path`` and the reason.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_file(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     os.listdir(folder)
        ['a.txt']
    """
    target = _followed(path)
    temporary = _open_file(target)
    try:
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise _refused(target, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path, *, replace: str | None = None) -> Iterator[Path]:
    """A temporary sibling folder of ``path``; it takes its place when the ``with`` ends well.

    Args:
        path: the folder to write; those above it are made if they aren't there.
        replace: a folder that already holds a file of this name may be replaced; None: none that holds something.

    Yields:
        The temporary folder's path. It is removed when the ``with`` ends with an exception.

    Raises:
        OutputError: ``path`` holds something that may not be replaced, it is a file, or the operating
            system refuses; the message names ``path`` and the reason.
    """
    target = _followed(path)
    temporary = _open_folder(target, replace)
    try:
        yield temporary
        _refuse_to_replace(target, replace)  # much may have appeared there meanwhile
        if target.is_dir():  # what was there goes aside first, so that no moment shows a mixture
            aside = temporary.with_suffix(".old")
            os.rename(target, aside)
            try:
                os.rename(temporary, target)
            except BaseException:
                os.rename(aside, target)
                raise
            shutil.rmtree(aside)
        else:
            os.rename(temporary, target)
    except OSError as error:
        raise _refused(target, error) from error
    except OutputError as error:  # of a file in it, by a name that nobody has given
        raise OutputError(str(error).replace(str(temporary), str(target))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: str | Path, *, replace: str | None = None) -> None:
    """Refuses now what :func:`atomic_folder` would refuse at its beginning; leaves nothing behind.

    Raises:
        OutputError: as :func:`atomic_folder`.
    """
    target = _followed(path)
    with _new_parents(target):
        _open_folder(target, replace).rmdir()


def check_file(path: str | Path) -> None:
    """Refuses now what :func:`atomic_file` would refuse at its beginning; leaves nothing behind.

    Raises:
        OutputError: as :func:`atomic_file`.
    """
    target = _followed(path)
    with _new_parents(target):
        _open_file(target).unlink()


@contextmanager
def _new_parents(target: Path) -> Iterator[None]:
    """Removes afterwards what was made of the folders above ``target``."""
    missing = [folder for folder in target.absolute().parents if not folder.exists()]
    try:
        yield
    finally:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()


def _open_file(target: Path) -> Path:
    try:
        if target.is_dir():
            raise OutputError(f"{target} is a folder, not a file")
        temporary = _sibling(target)
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise _refused(target, error) from error
    return temporary


def _followed(path: str | Path) -> Path:
    """What a link points to, which is replaced; the link stays."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise OutputError(f"can't write {path}: {error}") from error


def _refuse_to_replace(target: Path, replace: str | None) -> None:
    if not target.is_dir() or not any(target.iterdir()) or (replace and (target / replace).is_file()):
        return
    if replace:
        raise OutputError(
            f"{target} holds something else, no {replace}; name another folder, or empty it yourself"
        )
    raise OutputError(f"{target} exists and is not empty; it can be replaced (--force)")


def _open_folder(target: Path, replace: str | None) -> Path:
    try:
        if target.exists() and not target.is_dir():
            raise OutputError(f"{target} is a file, not a folder")
        if Path.cwd().is_relative_to(target) or os.path.ismount(target):
            raise OutputError(f"{target} is in use: a folder is written whole; name one that isn't there yet")
        _refuse_to_replace(target, replace)
        temporary = _sibling(target)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise _refused(target, error) from error
    return temporary


def _refused(target: Path, error: OSError) -> OutputError:
    return OutputError(f"can't write {target}: {error.strerror or error}")


def _sibling(target: Path) -> Path:
    return target.absolute().with_name(f".{target.name}.{secrets.token_hex(4)}.part")
