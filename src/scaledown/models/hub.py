"""The hub: whether it can be reached, and its errors as ours."""

import contextlib
from collections.abc import Iterator

from scaledown.devices.halving import is_out_of_memory
from scaledown.errors import ModelError, NoRoomError, ScaleDownError


def reach_hub() -> None:
    """Raise an error if the hub cannot be reached. Its libraries would try for 30 s, with many messages."""
    from huggingface_hub import constants, get_session

    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=10)


@contextlib.contextmanager
def hub_errors(name: str, kind: str = "model") -> Iterator[None]:
    """Turn any error in the block into a `ModelError` whose message ends with the next step.

    Args:
        name: The model or dataset that is found or loaded in the block.
        kind: `model` or `dataset`, for the message.

    Raises:
        ModelError: The block raised an error that is not a `ScaleDownError`.
        NoRoomError: A device has too little memory.
    """
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except ScaleDownError:
        raise
    except Exception as error:  # libraries raise many kinds of errors; --debug shows the original
        causes = list(_causes(error))
        if any(map(is_out_of_memory, causes)):
            raise NoRoomError(
                f"{kind} {name}: out of memory while loading; use a smaller model, --dtype bfloat16, "
                "or for a teacher --teacher_8bit or --teacher_4bit"
            ) from error
        text = " ".join(str(cause) for cause in causes).lower()
        if any(isinstance(cause, GatedRepoError) for cause in causes) or "gated repo" in text:
            raise ModelError(
                f"{kind} {name} is gated: accept its licence on its page at huggingface.co, "
                "then log in with `hf auth login` or set HF_TOKEN"
            ) from error
        if any(isinstance(cause, HfHubHTTPError) and _http_status(cause) in {401, 404} for cause in causes):
            raise ModelError(
                f"{kind} {name} is not on the hub, or is private: check the spelling, or log in with "
                "`hf auth login`"
            ) from error
        if "trust_remote_code" in text:
            raise ModelError(
                f"{kind} {name} needs its own code, which is never run: use one that the libraries support"
            ) from error
        unreachable = any(
            isinstance(cause, (OfflineModeIsEnabled, ConnectionError)) or _is_network_error(cause)
            for cause in causes
        )
        if unreachable or "couldn't connect" in text or "offline mode" in text:
            instead = (
                "give a local copy, a folder as --query_dataset or a file as --queries_file "
                "(with HF_HUB_OFFLINE=1, the cache of `datasets` is used)"
                if kind == "dataset"
                else "give a local folder, or a bundled model (`bundled:smollm2-135m`, as a retriever "
                "`bundled:splade-tiny`, as a reranker `ql:bundled:smollm2-135m`; `--preset demo` of "
                "prepare, plan and index takes these)"
            )
            raise ModelError(
                f"{kind} {name} is not on this machine and the hub cannot be reached: check spelling and "
                "network, or "
                f"{instead}"
            ) from error
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelError(f"{kind} {name} cannot be loaded: {first_line}") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _http_status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_network_error(error: BaseException) -> bool:
    module = type(error).__module__.partition(".")[0]
    return module in {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"} and any(
        word in type(error).__name__ for word in ("Connect", "Timeout", "Network", "Proxy", "SSL")
    )
