"""`scaledown export-openvino MODEL`: export a teacher for OpenVINO before its first use."""

import shlex
import sys
from collections.abc import Sequence

from scaledown.config.flags import Parser, add_log_flags, path_or_url
from scaledown.data.teacher.engines.openvino import export, is_exported
from scaledown.errors import run_command
from scaledown.models.sources import resolve
from scaledown.models.weights import quiet_libraries
from scaledown.run.logs import start_logging


def main(argv: Sequence[str], program: str = "python -m scaledown.data.teacher.export_openvino") -> int:
    """Run the command line. Returns the exit status."""
    parser = Parser(
        prog=program,
        description="Export a teacher to OpenVINO, with weights at 8 bits. It is kept in the cache. Without "
        "this command, the first run with --teacher_backend openvino does it.",
    )
    parser.add_argument("model", type=path_or_url, metavar="MODEL", help="what --teacher_model takes")
    add_log_flags(parser)

    arguments = parser.parse_args(argv)
    start_logging(arguments.log_level, arguments.log_format)
    quiet_libraries()
    source = resolve(arguments.model)
    there = is_exported(source)
    folder = export(source)
    print(f"{folder}: {'already exists' if there else 'exported'}")
    print(f"next: scaledown prepare --teacher_backend openvino --teacher_model {shlex.quote(source.name)} …")
    return 0


if __name__ == "__main__":
    words = sys.argv[1:]
    raise SystemExit(run_command(lambda: main(words), debug="--debug" in words))
