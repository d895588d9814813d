"""A field says everything about itself: its role, bounds, unit, and what follows from them."""

import math
from dataclasses import dataclass, fields
from typing import Any

import pytest

from scaledown.config import answer, compare, evaluate, index, prepare, serve, shared, train
from scaledown.config.flags import command_parser, from_flags
from scaledown.config.options import ROLES, SHARE, Options, Range, option
from scaledown.config.prepare import PrepareConfig
from scaledown.config.train import TrainConfig
from scaledown.errors import UsageError

COMMANDS = {
    prepare.PrepareConfig: prepare.GROUPS,
    index.IndexCommandConfig: prepare.GROUPS,
    train.TrainConfig: train.GROUPS,
    train.PretrainConfig: train.GROUPS,
    answer.AnswerConfig: answer.GROUPS,
    serve.ServeConfig: serve.GROUPS,
    evaluate.EvaluateConfig: evaluate.GROUPS,
    compare.CompareConfig: compare.GROUPS,
}
SHARED = {
    index.IndexConfig,
    shared.WorkersConfig,
    shared.CleanConfig,
    shared.EngineConfig,
    train.StudentConfig,
}


def every(kind: type) -> set[type]:
    """The classes of the package that inherit from `kind`."""
    found = set(kind.__subclasses__())
    found |= {own for one in found for own in every(one)}
    return {one for one in found if one.__module__.startswith("scaledown.")}


def test_every_config_is_known_here() -> None:
    assert every(Options) == {*COMMANDS, *SHARED}


@pytest.mark.parametrize("config", sorted({*COMMANDS, *SHARED}, key=lambda kind: kind.__name__))
def test_every_flag_states_its_role(config: type[Options]) -> None:
    for item in fields(config):
        about = item.metadata["option"]
        assert about.role in ROLES, item.name
        assert about.text, item.name
        assert not about.automatic or item.default == 0, item.name
        assert not about.only_with or about.only_with in config.options(), item.name
        assert not about.only_with or about.role == "result", item.name
        assert not about.local or about.is_path, item.name
    assert sorted(config.named(*ROLES)) == sorted(config.options())


def test_a_flag_without_a_role_cannot_be_declared() -> None:
    with pytest.raises(TypeError, match="role"):
        option(0, "group", "text")
    with pytest.raises(ValueError, match="role 'identity': use one of result, input"):
        option(0, "group", "text", role="identity")


@pytest.mark.parametrize("config", COMMANDS)
def test_every_flag_is_in_the_help_of_its_command(config: type[Options]) -> None:
    text = command_parser("test", config, "", "", COMMANDS[config]).format_help()
    for name in config.options():
        assert f"--{name} " in text or f"--{name}\n" in text, name


@pytest.mark.parametrize(
    ("within", "value", "rule"),
    [
        (Range(0), -1, "not be negative"),
        (Range(2), 1, "be at least 2"),
        (Range(above=0), 0, "be above 0"),
        (Range(0, below=1), 1, "be at least 0 and below 1"),
        (SHARE, 1.5, "lie between 0 and 1"),
        (Range(0), math.inf, "not be negative, and finite"),
        (Range(above=0), math.nan, "be above 0, and finite"),
    ],
)
def test_number_outside_its_range_is_refused(within: Range, value: float, rule: str) -> None:
    @dataclass(frozen=True)
    class Config(Options):
        number: float = option(0.5, "group", "text", role="result", within=within)

    Config(number=3 if within != SHARE and within.allows(3) else 0.5)
    with pytest.raises(UsageError) as raised:
        Config(number=value)
    assert str(raised.value) == f"--number {value}: must {rule}"


def test_range_with_two_ends_is_the_unit_in_the_help() -> None:
    assert PrepareConfig.options()["min_groundedness"].unit == "0..1"
    assert serve.ServeConfig.options()["port"].unit == "0..65535"
    assert PrepareConfig.options()["top_k_retrieval"].unit == "passages"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics_file": "s3://b/m.prom"}, "--metrics_file is a URL: give a local path"),
        ({"columns": ("text",)}, "--columns text: use one of query_id, "),
        ({"columns": "query_id"}, "--columns: expected a tuple of texts"),
        ({"columns": ("",)}, "--columns: expected a tuple of texts, none of them empty"),
        ({"teacher_logprobs": 21}, "--teacher_logprobs 21: must lie between 0 and 20"),
    ],
)
def test_value_that_a_field_excludes_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        PrepareConfig(queries_file=("q.txt",), output_file="o.json", **settings)


def test_settings_accept_lists_for_tuples() -> None:
    given = PrepareConfig(queries_file=["q.txt"], output_file="o.json", columns=["query_id"])
    assert given == PrepareConfig(queries_file=("q.txt",), output_file="o.json", columns=("query_id",))


def test_home_folder_is_found_in_paths_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    given = {"model": "~/m", "query": "~/what is this?", "document": ["~/is home"]}
    config = from_flags(given, answer.AnswerConfig)
    assert (config.model, config.query, config.document) == (
        "/home/me/m",
        "~/what is this?",
        ("~/is home",),
    )


def test_flag_of_a_pretrained_model_is_refused_beside_it() -> None:
    flags = {"train_data": ["t.json"], "pretrained_model": "p", "num_layers": TrainConfig.num_layers}
    with pytest.raises(UsageError, match="--num_layers is settled by --pretrained_model: leave one"):
        from_flags(flags, TrainConfig)
    del flags["num_layers"]
    assert from_flags(flags, TrainConfig).pretrained_model == "p"


def test_worker_starts_no_workers_and_writes_no_metrics() -> None:
    given = PrepareConfig(
        queries_file=("q.txt",), output_file="o.json", workers=2, task_timeout=5.0, metrics_file="m.prom"
    )
    own = given.of_worker(4)
    assert own["workers"] == 4
    assert (own["executor"], own["task_timeout"], own["metrics_file"]) == ("local", 0.0, "")
