"""What a command may write: nothing that it reads, and over nothing that it did not make itself."""

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
    """Find out before any work whether an output can be written, and may be.

    Args:
        flag: What names the output, for messages.
        output: The file.
        reads: Paths and URLs of what the command reads.
        made: The command, which leaves a note beside what it made; or what tells otherwise whether an earlier
            run of the same command made what is there.
        overwrite: Replace what is there, whoever made it.

    Raises:
        UsageError: The output is also read.
        OutputError: Something else is there, or the output cannot be written.
    """
    file = output if isinstance(output, File) else File.at(str(output))
    check_apart(flag, str(output), reads)
    file.storage.check_writable(file.path, flag)
    check_free(flag, file, made, overwrite=overwrite)


def check_free(
    flag: str, output: File | Path, made: str | Callable[[], bool], *, overwrite: bool = False
) -> None:
    """Raise `OutputError` where something is that no earlier run made; the rest of `check_output`."""
    output = output if isinstance(output, File) else File.at(str(output))
    state = output.storage.state(output.path)
    there = state and not state.startswith("0 ")  # an empty file is nobody's
    if there and not overwrite and not (is_made(output.path, made) if isinstance(made, str) else made()):
        raise OutputError(
            f"{flag} {output} is there already, and is not what this command made: name another, or give "
            "--overwrite to replace it"
        )


def check_folder(output: Path, reads: Iterable[Path], *, made: bool) -> None:
    """Find out before any work whether a folder can be made: it is new, empty, or `made` by an earlier run.

    Raises `UsageError` where what is read lies in it, `OutputError` where it cannot be made.
    """
    for read in reads:
        if lies_in(str(read), str(output)):
            raise UsageError(f"--output_dir {output} holds {read}, which is read: name a new folder")
    if output.exists() and not made and (not output.is_dir() or any(output.iterdir())):
        raise OutputError(f"--output_dir {output} is there already, with other things: name a new folder")
    check_writable(output.parent / "folder", "--output_dir")


def check_apart(what: str, output: str, reads: Iterable[object]) -> None:
    """Raise `UsageError` where an output is what is read, or lies in a folder or URL that is."""
    for read in filter(None, map(str, reads)):
        if not output or not lies_in(output, read):
            continue
        if is_url(local(read)) or Path(local(read)).is_dir():
            raise UsageError(f"{what} {output} lies in {read}, which is read: put it elsewhere")
        if lies_in(read, output):  # else a file stands for a folder: an error when it is written
            raise UsageError(f"{what} {output} is also read: name another, it would be overwritten")


def lies_in(inner: str, outer: str) -> bool:
    """Whether a path or URL is the same as another, also through links, or lies in it."""
    inner, outer = local(inner), local(outer)
    if is_url(inner) or is_url(outer):
        return f"{inner.rstrip('/')}/".startswith(f"{outer.rstrip('/')}/")
    one, other = Path(inner).resolve(), Path(outer).resolve()
    return one.is_relative_to(other) or (one.exists() and other.exists() and one.samefile(other))


def note_made(output: Path, command: str) -> None:
    """Leave a note beside what a command made, by which it knows the file again until that is changed."""
    output = output.resolve()
    write_json(_note(output), _made(output, command))


def is_made(output: Path, command: str) -> bool:
    """Whether a file is as this command made it."""
    output = output.resolve()
    return bool(read_json(_note(output)) == _made(output, command))


def _note(output: Path) -> Path:
    return output.with_name(f".{output.name}.made.json")


def _made(output: Path, command: str) -> dict[str, str | int]:
    state = output.stat()
    return {"command": command, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
