"""`scaledown export-openvino MODEL`: a teacher for OpenVINO, weights at 8 bits, kept in the cache.

The exporter needs an older transformers than everything else here, so it runs in an environment of its own
that borrows the rest (torch above all) from the running one. Both are made once.
"""

import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from filelock import FileLock

from scaledown.config.flags import Parser, add_log_flags, path_or_url
from scaledown.data.teacher.engines.openvino import WEIGHTS, exported, is_exported
from scaledown.errors import ModelError, run_command
from scaledown.models.hub import hub_errors
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import loadable
from scaledown.run.logs import start_logging
from scaledown.run.storage import cache_directory

log = logging.getLogger("scaledown")

# Versions that work together. optimum-intel requires a torchvision that would replace torch: install it
# alone.
WITH_DEPENDENCIES: Final = (
    "transformers==5.5.4",
    "huggingface-hub==1.21.0",
    "nncf==3.4.0",
    "openvino==2026.4.1",
    "openvino-tokenizers==2026.4.1.0",
)
ALONE: Final = ("optimum==2.3.0", "optimum-intel==2.2.0")

# Kept from it: what sends usage data, and what is borrowed but made for the newer libraries. All is optional.
_HIDDEN: Final = ("openvino_telemetry", "datasets", "sentence_transformers", "bitsandbytes")
_EXPORTER: Final = (
    f"import sys; sys.modules.update(dict.fromkeys({_HIDDEN})); "
    "from optimum.commands.optimum_cli import main; main()"
)


def export(source: ModelSource) -> Path:
    """Return the folder of the exported model; the first call makes it. Raises `ModelError`."""
    folder = exported(source)
    if is_exported(source):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if is_exported(source):
            return folder
        weights = _weights(source)
        python = _environment()
        record, temporary = Path(f"{folder}.log"), Path(f"{folder}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        log.info("exporting %s: a minute for a small model, more for a large one", source.name)
        flags = ["--task", "text-generation-with-past", "--weight-format", WEIGHTS, "--model", str(weights)]
        _run([python, "-I", "-c", _EXPORTER, "export", "openvino", *flags, str(temporary)], record)
        if not (temporary / "openvino_model.xml").exists():
            raise ModelError(f"model {source.name}: the export made no openvino_model.xml; see {record}")
        temporary.replace(folder)
    return folder


def _weights(source: ModelSource) -> Path:
    """A folder of ordinary weights."""
    from huggingface_hub import snapshot_download

    name, _ = loadable(source)
    if source.gguf_file or not source.revision:
        return Path(name)
    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    with hub_errors(source.name):
        for patterns in (wanted, [*wanted, "*.bin"]):  # pickles only where there is nothing else
            folder = Path(
                snapshot_download(
                    name,
                    revision=source.revision,
                    allow_patterns=patterns,
                    ignore_patterns=["*/*", "consolidated*"],
                )
            )
            if any(folder.glob("*.safetensors")):
                break
    return folder


def _environment() -> str:
    """Return the Python of the exporter's environment; the first call makes the environment."""
    borrowed = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    state = "\n".join([*WITH_DEPENDENCIES, *ALONE, sys.version, *borrowed])
    digest = hashlib.sha256(state.encode()).hexdigest()[:16]
    folder = cache_directory() / "openvino" / f"environment-{digest}"
    python, complete, record = str(folder / "bin" / "python"), folder / "complete", Path(f"{folder}.log")
    with FileLock(f"{folder}.lock"):
        if complete.exists():
            return python
        log.info("making the exporter's environment, once: %s", folder)
        _run([sys.executable, "-I", "-m", "venv", "--clear", str(folder)], record)
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "borrowed.pth").write_text("".join(f"{path}\n" for path in borrowed), encoding="utf-8")
        install = [python, "-I", "-m", "pip", "install", "--disable-pip-version-check"]
        _run([*install, *WITH_DEPENDENCIES], record)
        _run([*install, "--no-deps", *ALONE], record)
        complete.touch()
    return python


def _run(words: Sequence[str], record: Path) -> None:
    """Run a process, its output kept in `record`. Raises `ModelError` with its last lines."""
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}  # everything it needs is in a folder
    with record.open("w", encoding="utf-8") as output:
        status = subprocess.run(  # noqa: S603
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=offline, check=False
        ).returncode
    if status:
        last = record.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
        raise ModelError(
            f"the export failed with status {status}: {' '.join(last)[-600:]} (all of it: {record}); correct "
            "that and run the same command again, or use --teacher_backend transformers"
        )


def main(argv: Sequence[str], program: str = "python -m scaledown.data.teacher.export_openvino") -> int:
    """Run the command line. Returns the exit status."""
    parser = Parser(
        prog=program,
        description="Export a teacher to OpenVINO, with weights at 8 bits, once: it is kept in the cache.",
    )
    parser.add_argument("model", type=path_or_url, metavar="MODEL", help="what --teacher_model takes")
    add_log_flags(parser)

    arguments = parser.parse_args(argv)
    start_logging(arguments.log_level, arguments.log_format)
    source = resolve(arguments.model)
    there = is_exported(source)
    folder = export(source)
    print(f"{folder}: {'already exists' if there else 'exported'}")
    print(f"next: scaledown prepare --teacher_backend openvino --teacher_model {shlex.quote(source.name)} …")
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    raise SystemExit(run_command(lambda: main(words), debug="--debug" in words))
