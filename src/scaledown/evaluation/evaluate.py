"""The command `scaledown evaluate`: measure a model and its baselines, or rankings, into `results.json`."""

import shlex
from collections.abc import Sequence

from scaledown.command import CommandHelp, program_name, run_cli
from scaledown.config.evaluate import GROUPS, EvaluateConfig
from scaledown.evaluation.results import RESULTS_FILE, Results, held_table, remarks, results_table
from scaledown.evaluation.run import ANSWERS_FILE, QUERIES_FILE, evaluate
from scaledown.run.progress import counted


def evaluation_summary(results: Results, config: EvaluateConfig) -> str:
    """Return what the finished command prints: measures with intervals, problems, the next command.

    Args:
        results: The result of `evaluate`.
        config: The settings of the command.
    """
    output, counts = config.output_dir, results.counts
    if results.kind == "rankings":
        lines = [f"{output}: {counts['queries']:,} judged queries"]
        following = f"look at each query in {output}/{QUERIES_FILE}"
    else:
        whose = "gold answers" if results.right_answers == "gold" else "the teacher's answers taken as right"
        lines = [
            f"{output}: {counted(counts['questions'], 'questions')} about "
            f"{counted(counts['articles'], 'articles')}, {whose}"
        ]
        following = f"look at each answer in {output}/{ANSWERS_FILE}"
        if not config.judge_model:
            kept = f"evaluate --config {shlex.quote(f'{output}/{RESULTS_FILE}')} --judge_model MODEL"
            following = (
                f"{program_name()} {kept} grades the same answers, which are in {output}/{ANSWERS_FILE}"
            )
    notes = [f"  {line}" for line in remarks(results)]
    tables = [text for text in (results_table(results), held_table(results)) if text]
    parts = ["\n".join(lines), *tables, *(["\n".join(notes)] if notes else []), f"next: {following}"]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None, program: str = "scaledown evaluate") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "--model DIR --data FILE | --run FILE --qrels FILE",
        "Measure the answers of a trained model and its baselines, or rankings, with intervals and paired "
        "tests. To continue an interrupted evaluation, run the same command again.",
        GROUPS,
    )
    return run_cli(EvaluateConfig, evaluate, evaluation_summary, usage=usage, argv=argv, resumes=True)
