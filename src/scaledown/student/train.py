"""The command `scaledown train`: train a model on training data."""

from collections.abc import Sequence
from typing import Any

from scaledown.command import CommandHelp, run_cli
from scaledown.config.train import GROUPS, TrainConfig


def main(argv: Sequence[str] | None = None, program: str = "scaledown train") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "--train_data FILE",
        "Train OSCAR: a compressor of documents, and a generator that answers from the compressed documents. "
        "torchrun and accelerate launch start it on several GPUs.",
        GROUPS,
    )

    def run(config: TrainConfig, *, overwrite: bool = False) -> Any:  # imports here: the help needs no torch
        from scaledown.student.training.run import train

        return train(config, overwrite=overwrite)

    def shown(result: Any, _config: TrainConfig) -> str:
        from scaledown.student.training.summary import training_summary

        return training_summary(result)

    return run_cli(TrainConfig, run, shown, usage=usage, argv=argv)
