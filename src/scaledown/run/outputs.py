"""Checks of outputs: a command never overwrites its inputs, or files that it has not written itself."""

from collections.abc import Callable, Iterable
from pathlib import Path

from scaledown.errors import OutputError, UsageError
from scaledown.run.atomic import check_writable, read_json, write_json
from scaledown.run.locations import File
from scaledown.urls import is_url, local


def check_output(
    flag: str,
    output: File | Path,
    reads: Iterable[object],
    *,
    made: str | Callable[[], bool],
    overwrite: bool = False,
) -> None:
    """Check before any work that an output can be written, and may be overwritten.

    Args:
        flag: The flag of the output, for messages.
        output: The file.
        reads: Paths and URLs of the command's inputs.
        made: The name of the command, which leaves a note beside its output; or a function that returns
            whether an earlier run of the command wrote the present file.
        overwrite: Replace any present file.

    Raises:
        UsageError: The output is also an input.
        OutputError: There is a file that this command has not written, or the output cannot be written.
    """
    file = output if isinstance(output, File) else File.at(str(output))
    check_apart(flag, str(output), reads)
    file.storage.check_writable(file.path, flag)
    check_free(flag, file, made, overwrite=overwrite)


def check_free(
    flag: str, output: File | Path, made: str | Callable[[], bool], *, overwrite: bool = False
) -> None:
    """Check that an output does not exist, or may be overwritten; a part of `check_output`.

    Args:
        flag: The flag of the output, for messages.
        output: The file.
        made: As for `check_output`.
        overwrite: Replace any present file.

    Raises:
        OutputError: There is a file with content that no earlier run has written.
    """
    output = output if isinstance(output, File) else File.at(str(output))
    state = output.storage.state(output.path)
    there = state and not state.startswith("0 ")  # an empty file may be replaced
    if there and not overwrite and not (is_made(output.path, made) if isinstance(made, str) else made()):
        raise OutputError(
            f"{flag} {output} already exists, and this command has not written it: name another, or give "
            "--overwrite to replace it"
        )


def check_folder(output: Path, reads: Iterable[Path], *, made: bool) -> None:
    """Check before any work that a folder can be written.

    Args:
        output: The folder of `--output_dir`.
        reads: Paths of the command's inputs.
        made: Whether an earlier run of the command wrote the present folder.

    Raises:
        UsageError: The folder contains an input.
        OutputError: The folder holds other files, or cannot be written.
    """
    for read in reads:
        if lies_in(str(read), str(output)):
            raise UsageError(f"--output_dir {output} holds {read}, which is read: name a new folder")
    if output.exists() and not made and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"--output_dir {output} already exists, with other things: name a new folder")
    check_writable(output.parent / "folder", "--output_dir")


def check_apart(what: str, output: str, reads: Iterable[object]) -> None:
    """Check that an output is not an input, and is not inside a folder or URL that is an input.

    Args:
        what: The flag of the output, for messages.
        output: A path or a URL; nothing is checked if it is empty.
        reads: Paths and URLs of the command's inputs; empty ones are left out.

    Raises:
        UsageError: The output is an input, or is inside one.
    """
    for read in filter(None, map(str, reads)):
        if not output or not lies_in(output, read):
            continue
        if is_url(local(read)) or Path(local(read)).is_dir():
            raise UsageError(f"{what} {output} lies in {read}, which is read: put it elsewhere")
        if lies_in(read, output):  # otherwise a parent of the output is a file: an error when it is written
            raise UsageError(f"{what} {output} is also read: name another, it would be overwritten")


def lies_in(inner: str, outer: str) -> bool:
    """Whether a path or URL equals another one or is inside it. Links on the disk are followed.

    Args:
        inner: A path or a URL.
        outer: The file or folder that may contain it.
    """
    inner, outer = local(inner), local(outer)
    if is_url(inner) or is_url(outer):
        return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")
    one, other = Path(inner).resolve(), Path(outer).resolve()
    return one.is_relative_to(other) or (one.exists() and other.exists() and one.samefile(other))


def note_made(output: Path, command: str) -> None:
    """Write a note beside a command's output. It identifies the file until the file is changed.

    Args:
        output: The file, which exists.
        command: The name of the command; `check_output` has the same name in `made`.
    """
    output = output.resolve()
    write_json(_note(output), _made(output, command))


def is_made(output: Path, command: str) -> bool:
    """Whether a command has written a file, and the file is unchanged.

    Args:
        output: The file, which exists.
        command: The name that `note_made` got.
    """
    output = output.resolve()
    return bool(read_json(_note(output)) == _made(output, command))


def _note(output: Path) -> Path:
    return output.with_name(f".{output.name}.made.json")


def _made(output: Path, command: str) -> dict[str, str | int]:
    state = output.stat()
    return {"command": command, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
