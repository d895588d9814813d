"""Settings of `scaledown serve`. Each field is documented once, for the `--help`."""

import ipaddress
import os
from dataclasses import dataclass
from typing import Final

from scaledown.config.options import Checked, option
from scaledown.config.prepare import OUTPUT
from scaledown.config.shared import AUTO_DTYPE, DTYPES, MACHINE
from scaledown.config.train import BUDGETS
from scaledown.errors import UsageError

MODEL: Final = "model"
NETWORK: Final = "network"
LIMITS: Final = "limits of a request"
GROUPS: Final = (MODEL, NETWORK, LIMITS, OUTPUT, MACHINE)

KEY_VARIABLE: Final = "SCALEDOWN_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeConfig(Checked):
    """Settings of `scaledown serve`."""

    model: str = option("", MODEL, "folder that scaledown train made, or a name on the hub", metavar="DIR")
    compression_rate: int = option(
        0,
        MODEL,
        "of a pointer, where a request names no other: 4 to 32 document tokens to one memory token; 0 is the "
        "model's own",
        "tokens",
        metavar="N",
    )
    budget: str = option(
        "each",
        MODEL,
        "of a pointer, where a request names no other: each document has memory tokens by its length, or "
        "those of a question share them by score",
        choices=BUDGETS,
    )
    embedding_cache: float = option(
        0.5,
        MODEL,
        "keep the embeddings of (query, document) pairs that may come again; 0: none",
        "GB",
        metavar="GB",
    )
    host: str = option(
        "127.0.0.1",
        NETWORK,
        f"address to listen at; another than this machine's own needs a key in {KEY_VARIABLE}",
        metavar="HOST",
    )
    port: int = option(8000, NETWORK, "port to listen at; 0 takes a free one", metavar="N")
    insecure: bool = option(False, NETWORK, "serve other machines without a key")
    drain_seconds: float = option(
        30.0,
        NETWORK,
        "after SIGTERM or Ctrl-C, finish what is asked already for at most so long",
        "seconds",
        metavar="S",
    )
    max_waiting: int = option(
        256, LIMITS, "requests that may wait; more are told to come again (429)", "requests", metavar="N"
    )
    max_documents: int = option(128, LIMITS, "most documents of one request", "documents", metavar="N")
    max_body: int = option(
        4_000_000, LIMITS, "longest body, refused before it is read further", "bytes", metavar="N"
    )
    max_document_characters: int = option(50_000, LIMITS, "longest document", "characters", metavar="N")
    max_new_tokens: int = option(1024, LIMITS, "longest answer that may be asked for", "tokens", metavar="N")
    default_new_tokens: int = option(
        128, LIMITS, "longest answer where a request names no limit", "tokens", metavar="N"
    )
    request_timeout: float = option(
        120.0, LIMITS, "a request that takes longer ends with an error", "seconds", metavar="S"
    )
    log_texts: bool = option(
        False, OUTPUT, "log queries and answers, too; without it no text of a request is logged"
    )
    batch_size: int = option(32, MACHINE, "answers written at the same time", "answers", metavar="N")
    device: str = option("auto", MACHINE, "auto, cpu, cuda, cuda:N or mps", metavar="DEVICE")
    dtype: str = option("auto", MACHINE, AUTO_DTYPE, choices=DTYPES)

    def __post_init__(self) -> None:
        if not self.model:
            raise UsageError("give --model DIR, the folder of a trained model")
        self._check_choices()
        self._check_at_least(
            1,
            *("max_documents", "max_body", "max_document_characters", "max_new_tokens"),
            *("default_new_tokens", "batch_size"),
        )
        self._check_at_least(0, "max_waiting", "compression_rate")
        self._check_finite("embedding_cache", "drain_seconds")
        self._check_positive("request_timeout")
        if not 0 <= self.port < 1 << 16:
            raise UsageError(f"--port {self.port}: must lie between 0 and 65535")
        if self.default_new_tokens > self.max_new_tokens:
            raise UsageError(
                f"--default_new_tokens {self.default_new_tokens} is above --max_new_tokens "
                f"{self.max_new_tokens}: lower it"
            )


def api_key(config: ServeConfig) -> str:
    """The key that clients must give, from the environment; empty where none is needed.

    Raises `UsageError` where others than this machine could ask without one.
    """
    key = os.environ.get(KEY_VARIABLE, "")
    if key != key.strip() or (KEY_VARIABLE in os.environ and not key):
        raise UsageError(f"{KEY_VARIABLE} is empty or has spaces around it: set it to the key, or unset it")
    if not key and not config.insecure and not _is_loopback(config.host):
        raise UsageError(
            f"--host {config.host}: others could ask without a key; set {KEY_VARIABLE}, or give --insecure"
        )
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
