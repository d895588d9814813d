"""The teachers of a run: which engine runs them, how they are loaded, what their answers depend on."""

from typing import Any, NamedTuple

from scaledown.config.shared import AUTO
from scaledown.data.prompts import PROMPT_VERSION, Template, load_template
from scaledown.data.session.enter import Session
from scaledown.data.teacher.api import choose_backend, engine_of, load_teacher, preflight
from scaledown.data.teacher.base import EngineSettings, Teacher, TeacherSettings
from scaledown.models.sources import ModelSource
from scaledown.run.atomic import write_json


class Teachers(NamedTuple):
    """How the teachers of a run are loaded and asked."""

    engine: EngineSettings
    """The engine, with its backend chosen."""
    generation: TeacherSettings
    """How a teacher decodes."""
    template: Template
    """The text around question and documents."""
    device: str
    """cpu, cuda, cuda:N or mps."""
    dtype: str
    """The dtype for loading a model."""
    settings: dict[str, Any]
    """Settings that answers depend on, without model, documents and temperature."""

    def load(self, model: ModelSource, spent_tokens: int = 0, logprobs: int = 0) -> Teacher:
        """Load a teacher.

        Args:
            model: Its weights.
            spent_tokens: Tokens of `--max_total_tokens` that earlier runs with the same settings used.
            logprobs: Number of log probabilities for each answer token; 0 is none.

        Raises:
            ModelError: The model cannot be loaded.
        """
        generation = self.generation._replace(logprobs=logprobs)
        return load_teacher(model, self.device, self.dtype, generation, self.engine, spent_tokens)


def find_teachers(session: Session) -> Teachers:
    """Choose the engine, if the settings leave it open, and check that it can load the teachers.

    Servers are asked before any work, unless there are answers already.

    Args:
        session: The run.

    Raises:
        ScaleDownError: The engine does not support the settings, or cannot load a teacher here.
    """
    config, sources, run = session.config, session.sources, session.run
    engine, generation = EngineSettings.of(config), TeacherSettings.of(config)
    engine = engine._replace(backend=_keep_backend(session, engine, generation))
    template = load_template(config.prompt)
    settings = {
        "backend": engine.backend,
        "bits": generation.bits,
        "lora": session.identities.get("lora"),
        "prompt": [PROMPT_VERSION, *template],
        "document_tokens": config.teacher_document_tokens,
        "context": config.teacher_context,
        "max_new_tokens": config.max_new_tokens,
    }
    own = engine_of(engine.backend)
    if not own.served:
        settings |= session.machine
    if own.deterministic:
        settings |= {"batch_size": config.teacher_batch_size}
    if not run.storage.glob(run.path, "answers/*/done.json"):
        for model in filter(None, (sources.teacher, sources.second_teacher)):
            preflight(engine, model, session.device, generation)
    dtype = own.dtype(session.given.dtype, config.dtype)
    return Teachers(engine, generation, template, session.device, dtype, settings)


def _keep_backend(session: Session, engine: EngineSettings, generation: TeacherSettings) -> str:
    """Return the engine that `auto` chose when this run began; for a new run, the best one for both teachers.

    Another engine, for example one that was installed since, would make all answers again.
    """
    run, sources, device = session.run, session.sources, session.device
    path = run.path / "engine.json"
    kept = run.storage.read_json(path)
    if engine.backend == AUTO and isinstance(kept, dict) and kept.get("request") == session.request:
        engine = engine._replace(backend=str(kept.get("backend")))
    backend = choose_backend(engine, sources.teacher, device, generation)
    if sources.second_teacher:
        choose_backend(engine._replace(backend=backend), sources.second_teacher, device, generation)
    write_json(path, {"request": session.request, "backend": backend})
    run.storage.publish(path)
    return backend
