"""`scaledown pretrain`: text in, a model out whose compressor and generator know each other."""

from collections.abc import Sequence

from scaledown.command import Usage, run_cli
from scaledown.config.train import GROUPS, PretrainConfig
from scaledown.student.training.run import train
from scaledown.student.training.summary import summary


def main(argv: Sequence[str] | None = None, program: str = "scaledown pretrain") -> int:
    """The command line; gives the exit status."""
    usage = Usage(
        program,
        "--corpus_path PATH",
        "Teach a compressor and a generator to understand each other before training: passages of any text "
        "are compressed, and repeated or continued from what is left of them. Separate compressors need it.",
        GROUPS,
    )
    return run_cli(
        PretrainConfig,
        train,
        lambda result, _: summary(result, pretrained=True),
        usage=usage,
        argv=argv,
    )


if __name__ == "__main__":
    raise SystemExit(main())
