"""Settings of `scaledown serve`. The text of each field is its `--help`."""

import os
from dataclasses import dataclass
from typing import Final

from scaledown.config.options import Options, Range, option
from scaledown.config.shared import AUTO_DTYPE, DTYPES, ENGINES, ENGINES_HELP, MACHINE, MODEL, OUTPUT
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError
from scaledown.urls import is_loopback

NETWORK: Final = "network"
LIMITS: Final = "limits of a request"
GROUPS: Final = (MODEL, NETWORK, LIMITS, OUTPUT, MACHINE)

KEY_VARIABLE: Final = "SCALEDOWN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Options):
    """Settings of `scaledown serve`."""

    model: str = option(
        "", MODEL, "folder of a trained model, or a name on the hub", role="model", metavar="DIR"
    )
    compression_rate: int = option(
        0,
        MODEL,
        "for a pointer, if a request names no other: 4 to 32 document tokens for one memory token; 0: the "
        "model's own",
        "tokens",
        role="result",
        within=Range(0),
    )
    budget: str = option(
        "each",
        MODEL,
        "for a pointer, if a request names no other: each document has memory tokens by its length, or the "
        "documents of a question share theirs by score",
        role="result",
        choices=BUDGETS,
    )
    embedding_cache: float = option(
        0.5,
        MODEL,
        "memory to cache embeddings of (query, document) pairs; 0: none",
        "GB",
        role="operation",
        within=Range(0),
    )
    host: str = option(
        "127.0.0.1",
        NETWORK,
        f"address to listen at; any other than a loopback address needs a key in {KEY_VARIABLE}",
        role="operation",
        metavar="HOST",
    )
    port: int = option(
        8000, NETWORK, "port to listen at; 0: a free one", role="operation", within=Range(0, (1 << 16) - 1)
    )
    insecure: bool = option(False, NETWORK, "serve other machines without a key", role="operation")
    drain_seconds: float = option(
        30.0,
        NETWORK,
        "after SIGTERM or Ctrl-C, let running requests finish for at most this long",
        "seconds",
        role="operation",
        within=Range(0),
    )
    max_waiting: int = option(
        256,
        LIMITS,
        "requests that may wait; others are refused with status 429",
        "requests",
        role="operation",
        within=Range(0),
    )
    max_documents: int = option(
        128, LIMITS, "most documents of one request", "documents", role="operation", within=Range(1)
    )
    max_body: int = option(
        4_000_000, LIMITS, "longest body of a request", "bytes", role="operation", within=Range(1)
    )
    max_document_characters: int = option(
        50_000, LIMITS, "longest document", "characters", role="operation", within=Range(1)
    )
    max_new_tokens: int = option(
        1024, LIMITS, "longest answer that a request may ask for", "tokens", role="operation", within=Range(1)
    )
    default_new_tokens: int = option(
        128, LIMITS, "longest answer if a request names no limit", "tokens", role="result", within=Range(1)
    )
    request_timeout: float = option(
        120.0,
        LIMITS,
        "a request that takes longer ends with an error",
        "seconds",
        role="operation",
        within=Range(above=0),
    )
    log_texts: bool = option(
        False,
        OUTPUT,
        "also log queries and answers; without it, no text of a request is logged",
        role="report",
    )
    engine: str = option("auto", MACHINE, ENGINES_HELP, role="operation", choices=ENGINES)
    generator_8bit: bool = option(
        False,
        MACHINE,
        "round the generator's weights to 8 bits: faster, and some answers differ (engine openvino)",
        role="result",
    )
    batch_size: int = option(
        32, MACHINE, "answers written at the same time", "answers", role="result", within=Range(1)
    )
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", role="result", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, role="result", choices=DTYPES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model:
            raise UsageError("give --model DIR, the folder of a trained model")
        if self.default_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"--default_new_tokens {self.default_new_tokens} is above --max_new_tokens "
                f"{self.max_new_tokens}: lower it"
            )


def api_key(config: ServeConfig) -> str:
    """Return the key that clients must send.

    Args:
        config: The host, and whether a server without a key is allowed.

    Returns:
        The value of the environment variable `KEY_VARIABLE`; empty if no key is needed.

    Raises:
        UsageError: Other machines could send requests without a key, or the variable is empty or has spaces.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if key != key.strip() or (KEY_VARIABLE in os.environ and not key):
        raise UsageError(f"{KEY_VARIABLE} is empty or has spaces around it: set it to the key, or unset it")
    if not key and not config.insecure and not is_loopback(config.host):
        raise UsageError(
            f"--host {config.host}: other machines could send requests without a key; set {KEY_VARIABLE}, or "
            "give --insecure"
        )
    return key
