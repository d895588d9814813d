"""The command `scaledown train`: train a model on training data."""

from collections.abc import Sequence

from scaledown.command import Usage, run_cli
from scaledown.config.train import GROUPS, TrainConfig


def main(argv: Sequence[str] | None = None, program: str = "scaledown train") -> int:
    """Run the command line. Returns the exit status."""
    usage = Usage(
        program,
        "--train_data FILE",
        "Train OSCAR: a compressor of documents, and a generator that answers from the compressed documents. "
        "torchrun and accelerate launch start it on several GPUs.",
        GROUPS,
    )

    def run(config: TrainConfig, *, overwrite: bool = False) -> str:  # imports here: the help needs no torch
        from scaledown.student.training.run import train
        from scaledown.student.training.summary import summary

        return summary(train(config, overwrite=overwrite))

    return run_cli(TrainConfig, run, lambda told, _: told, usage=usage, argv=argv)
