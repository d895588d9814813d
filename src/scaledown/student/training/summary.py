"""The summary that a finished training prints."""

import shlex
from pathlib import Path
from typing import Final

from scaledown.command import program_name
from scaledown.run.progress import counted, duration
from scaledown.student.training.run import Trained

_FEW_STEPS: Final = 50
"""Steps below which the summary says that a training was short."""


def training_summary(result: Trained, *, pretrained: bool = False) -> str:
    """Return what the finished command prints: data, losses, speed, the next command.

    Args:
        result: The result of `train`.
        pretrained: Whether the command was `scaledown pretrain`.
    """
    lines = ["nothing to do: this run is finished"] if result.already_done else []
    early = f" of {result.planned_steps:,}, stopped early" if result.steps < result.planned_steps else ""
    lines += [
        f"{result.output}: {counted(result.examples, 'examples')}, {counted(result.steps, 'steps')}{early}",
        "",
        f"  loss        {result.loss_before:.4f} at the start, {result.loss:.4f} at the end",
    ]
    if result.held_out_loss is not None:
        before = "" if result.held_out_before is None else f"{result.held_out_before:.4f} before training, "
        lines.append(
            f"  held out    {before}{result.held_out_loss:.4f} after; {counted(result.held_out, 'examples')}"
        )
    if result.shared:
        lines.append(f"              {result.shared:,} of them share an article with training")
    number, longest, _, cut = result.documents
    lines.append(
        f"  documents   {number:,}, the longest of {longest:,} tokens; "
        + (f"{cut:,} cut to {result.doc_max_length:,}" if cut else "none cut")
    )
    read = min(result.batch_size, result.examples)
    lines.append(f"  step        {duration(result.seconds_per_step)} for {counted(read, 'examples')}")
    if result.steps < _FEW_STEPS:
        few = f"{counted(result.steps, 'steps')} {'is' if result.steps == 1 else 'are'}"
        lines.append(f"              {few} not enough to learn from: --max_steps N takes more")
    checkpoints = [file for file in Path(result.output).glob("checkpoint-*/**/*") if file.is_file()]
    if checkpoints:
        size = sum(file.stat().st_size for file in checkpoints)
        shown = f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
        lines.append(f"  disk        {shown} in {result.output}/checkpoint-*, which you can delete now")
    if result.skipped:
        lines.append(f"  skipped     {result.skipped:,} unusable records")
    folder = shlex.quote(result.output)
    results = shlex.quote(f"{result.output.rstrip('/')}-results")
    systems = "--systems compressed uncompressed closed_book"  # those that need no other model
    following = f"evaluate --model {folder} --data FILE --output_dir {results} {systems}"
    if pretrained:
        following = f"train --pretrained_model {folder} --train_data FILE --output_dir DIR"
    return "\n".join([*lines, "", f"next: {program_name()} {following}"])
