"""`scaledown pretrain`: text in, a model out whose compressor and generator know each other."""

from collections.abc import Sequence

from scaledown.config.train import PretrainConfig
from scaledown.student.train import run_command_line


def main(argv: Sequence[str] | None = None, program: str = "scaledown pretrain") -> int:
    """The command line; gives the exit status."""
    return run_command_line(
        argv,
        program,
        PretrainConfig,
        "--corpus_path PATH",
        "Teach a compressor and a generator to understand each other before training: passages of any text "
        "are compressed, and repeated or continued from what is left of them. Separate compressors need it.",
    )


if __name__ == "__main__":
    raise SystemExit(main())
