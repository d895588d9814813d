"""The command `scaledown serve`."""

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from scaledown.command import CommandHelp, run_cli
from scaledown.config.serve import GROUPS, ServeConfig, api_key
from scaledown.devices.choice import choose_device, dtype_to_run
from scaledown.errors import MissingExtraError, UsageError, install_command
from scaledown.models.sources import ModelSource, resolve
from scaledown.models.weights import onto, quiet_libraries

log = logging.getLogger("scaledown")

_SENDING_SECONDS: Final = 2  # to send the errors of requests that did not finish in time


def main(argv: Sequence[str] | None = None, program: str = "scaledown serve") -> int:
    """Run the command line.

    Args:
        argv: The arguments after the command's name; None for those of this process.
        program: The name of the command in its help.

    Returns:
        The exit status, see `run_command`.
    """
    usage = CommandHelp(
        program,
        "--model DIR",
        "Serve a trained model over HTTP, for clients of OpenAI's chat completions.",
        GROUPS,
    )
    return run_cli(
        ServeConfig,
        serve,
        lambda _status, _config: "",
        failure=lambda status, _config: "" if status else None,
        usage=usage,
        argv=argv,
    )


def serve(config: ServeConfig) -> int:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        config: The settings; the key of clients is read from the environment, see `api_key`.

    Returns:
        The exit status: 1 if the model failed several times in a row, else 0.

    Raises:
        ScaleDownError: The server cannot start.
    """
    key = api_key(config)
    listener = listen(config)  # first the port and the model: mistakes are reported before the imports
    with listener:
        source = resolve(config.model)
        try:
            import uvicorn

            from scaledown.serving.app import Server
        except ImportError as error:
            raise MissingExtraError(
                f"scaledown serve needs {error.name}: {install_command('serve')}"
            ) from error
        from scaledown.serving.engine import Engine
        from scaledown.student.settings import ScaleDownConfig

        settings = ScaleDownConfig.read(source)
        settings.check_rate(config.compression_rate or settings.compression_rate)
        settings.check_budget(config.budget)
        model, generation, writer = _load_model(config, source)
        name = Path(config.model).resolve().name if Path(config.model).is_dir() else config.model
        engine = Engine(model, config, generation)
        app = Server(engine, model.config, name, config, key).app()
        options: dict[str, Any] = {
            "log_config": None,
            "access_log": False,
            "server_header": False,
            # After this uvicorn cancels what is left; the engine has failed all requests before.
            "timeout_graceful_shutdown": math.ceil(config.drain_seconds) + _SENDING_SECONDS,
        }
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host

        class Reporting(uvicorn.Server):
            """Reports when requests are accepted: from then on signals end the server in order.

            What is not finished `--drain_seconds` after a signal is failed by the engine.
            """

            async def startup(self, sockets: list[socket.socket] | None = None) -> None:
                await super().startup(sockets)
                log.info("ready: %s at http://%s:%s/v1, by %s on %s", name, host, port, writer, model.device)

            async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
                asyncio.get_running_loop().call_later(config.drain_seconds, engine.refuse_all)
                await super().shutdown(sockets)

        server = Reporting(uvicorn.Config(app, **options))
        with _address_errors(config):
            listener.listen(1024)  # only now: connections are refused while the model loads
        engine.start(on_failure=lambda: setattr(server, "should_exit", True))
        try:
            server.run([listener])
        except KeyboardInterrupt:  # uvicorn raises the signal again after its shutdown
            log.info("stopped")
        finally:
            engine.stop(1.0)
    return 1 if engine.failed else 0


def listen(config: ServeConfig) -> socket.socket:
    """Bind a socket to `--host` and `--port`. Connections are accepted later.

    Args:
        config: With the host and the port; port 0 is any free one.

    Raises:
        UsageError: The address cannot be used.
    """
    listener = None
    try:
        with _address_errors(config):
            family, kind, protocol, _, address = socket.getaddrinfo(
                config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            listener = socket.socket(family, kind, protocol)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except UsageError:
        if listener is not None:
            listener.close()
        raise
    return listener


@contextlib.contextmanager
def _address_errors(config: ServeConfig) -> Iterator[None]:
    """Raise `UsageError` for an address that cannot be used."""
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--host {config.host} --port {config.port}: {error.strerror or error}; choose another"
        ) from error


def _load_model(config: ServeConfig, source: ModelSource) -> tuple[Any, Any, str]:
    """Return the model, the `Generation` of its engine (None: the model's own), and the engine's name."""
    quiet_libraries()
    from scaledown.models.openvino import keeps_positions
    from scaledown.student.engine_choice import choose_engine
    from scaledown.student.model import ScaleDownModel

    device = choose_device(config.device)
    engine = choose_engine(config.engine, device, source, eight_bits=config.generator_8bit)
    dtype = dtype_to_run(config.dtype, device)
    model = ScaleDownModel.from_pretrained(config.model, dtype=dtype, **onto(device)).eval()
    if model.config.generator_training == "lora":
        model.merge_lora()
    generation, title = engine.start(
        model,
        source,
        device,
        config.batch_size,
        asked=config.engine,
        eight_bits=config.generator_8bit,
    )
    if generation is None and not keeps_positions(model.generator.config):
        log.warning(
            "the generator's attention reads a window: with --engine transformers, a new request waits until "
            "all running answers are complete; lower --max_new_tokens, or use --engine vllm"
        )
    return model, generation, title
