"""The command `scaledown pretrain`: train compressor and generator on text, before training on answers."""

from collections.abc import Sequence
from typing import Any

from scaledown.command import CommandHelp, run_cli
from scaledown.config.train import GROUPS, PretrainConfig


def main(argv: Sequence[str] | None = None, program: str = "scaledown pretrain") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "--corpus_path PATH",
        "Train a compressor and a generator together on passages of any text, before `scaledown train`: the "
        "generator repeats or continues a passage from its embeddings. Separate compressors need it.",
        GROUPS,
    )

    def run(config: PretrainConfig, *, overwrite: bool = False) -> Any:
        # imported here: the help needs no torch
        from scaledown.student.training.run import train

        return train(config, overwrite=overwrite)

    def shown(result: Any, _config: PretrainConfig) -> str:
        from scaledown.student.training.summary import training_summary

        return training_summary(result, pretrained=True)

    return run_cli(PretrainConfig, run, shown, usage=usage, argv=argv)
