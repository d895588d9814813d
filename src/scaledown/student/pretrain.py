"""`scaledown pretrain`: text in, a model out whose compressor and generator know each other."""

from collections.abc import Sequence

from scaledown.command import Usage, run_cli
from scaledown.config.train import GROUPS, PretrainConfig


def main(argv: Sequence[str] | None = None, program: str = "scaledown pretrain") -> int:
    """The command line; gives the exit status."""
    usage = Usage(
        program,
        "--corpus_path PATH",
        "Teach a compressor and a generator to understand each other before training: passages of any text "
        "are compressed, and repeated or continued from what is left of them. Separate compressors need it.",
        GROUPS,
    )

    def run(config: PretrainConfig, **others: bool) -> str:  # imports here: the help needs no torch
        from scaledown.student.training.run import train
        from scaledown.student.training.summary import summary

        return summary(train(config, **others), pretrained=True)

    return run_cli(PretrainConfig, run, lambda told, _: told, usage=usage, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
