"""A server that compresses against the same server reading the text: requests a second, time to first token.

10 documents of 128 tokens, a query of 16, 32 new tokens (arXiv 2504.07109, table 5), 16x, SmolLM2-135M, 5 and
8 layers; bursts of 1, 8 and 32 requests at the same time. Both sides ask one process of
`scaledown serve`'s own engine, in turn; no pair of query and document comes twice, so nothing comes from the
cache of embeddings. Answers do not end early. The student is untrained: what it answers does not matter here.
`--engine openvino` lets OpenVINO write both sides' answers, `--engine vllm` vLLM, in `.venv-vllm` on a CPU.
For vLLM another line shows the text when all requests share their documents, whose prefix it reads once.
"""

import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from random import Random
from typing import NamedTuple

from common import close, fast_dtype, machine, parser, verdict

GENERATOR = "bundled:smollm2-135m"
DOCUMENTS, DOCUMENT_TOKENS, QUERY_TOKENS, NEW_TOKENS = 10, 128, 16, 32
LAYERS = (5, 8)
CLIENTS = (1, 8, 32)
SIDES = (True, False)  # compressed, text
BAR = 2.0  # requests a second, 5 layers, 8 clients
FIRST_BAR, ALONE_BAR = 2.5, 1.6


class Request(NamedTuple):
    """What one request took, in seconds."""

    first: float
    whole: float


class Round(NamedTuple):
    """What some clients saw."""

    per_second: float
    requests: list[Request]
    peak_mb: float


def serve(layers: int, writes_with: str) -> None:
    """Run a server on a free port, which is printed; ends with its standard input."""
    import uvicorn

    from scaledown.config.serve import ServeConfig
    from scaledown.devices.choice import dtype_to_run
    from scaledown.evaluation.efficiency import one_token_words
    from scaledown.extensions import STUDENT_ENGINES
    from scaledown.models.sources import resolve
    from scaledown.models.weights import quiet_libraries
    from scaledown.serving.app import Server
    from scaledown.serving.engine import Engine
    from scaledown.serving.serve import listen
    from scaledown.student.model import ScaleDownModel
    from scaledown.student.settings import ScaleDownConfig

    quiet_libraries()
    config = ServeConfig(model=GENERATOR, port=0, request_timeout=3600.0)
    settings = ScaleDownConfig(num_layers=layers, doc_max_length=DOCUMENT_TOKENS)
    model = ScaleDownModel.build(settings, resolve(GENERATOR), dtype=dtype_to_run(fast_dtype(), "cpu")).eval()
    model.merge_lora()
    model.generator.generation_config.eos_token_id = []  # no answer ends early
    chosen, source = STUDENT_ENGINES[writes_with], resolve(GENERATOR)
    generation, _ = chosen.start(model, source, "cpu", config.batch_size, asked=writes_with)
    engine = Engine(model, config, generation)
    app = Server(engine, model.config, "student", config, "").app()
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    listener = listen(config)
    listener.listen()
    told = {"port": listener.getsockname()[1], "words": one_token_words(model.tokenizer)}
    print(json.dumps(told), flush=True)
    engine.start(lambda: None)
    threading.Thread(
        target=lambda: (sys.stdin.read(), setattr(server, "should_exit", True)), daemon=True
    ).start()
    server.run([listener])
    engine.stop(1.0)


class Served:
    """A server in a process of its own, and questions that it was never asked."""

    def __init__(self, layers: int, writes_with: str) -> None:
        words = [sys.executable, __file__, "--serve", str(layers), "--engine", writes_with]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        told = json.loads(self._process.stdout.readline())
        self._port, self._words = told["port"], told["words"]
        self._seeds = itertools.count()

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def body(self, *, compressed: bool, shared: bool = False) -> bytes:
        """A request for a question of its own, with documents of its own or with those that all share."""
        random = Random(next(self._seeds))

        def text(tokens: int, source: Random = random) -> str:
            return " ".join(source.choices(self._words, k=tokens))

        writes = Random("shared") if shared else random
        return json.dumps(
            {
                "messages": [{"role": "user", "content": text(QUERY_TOKENS)}],
                "documents": [text(DOCUMENT_TOKENS, writes) for _ in range(DOCUMENTS)],
                "compressed": compressed,
                "max_tokens": NEW_TOKENS,
                "stream": True,
            }
        ).encode()

    def ask(self, body: bytes) -> Request:
        """Send a request and read its answer."""
        started = time.perf_counter()
        connection = HTTPConnection("127.0.0.1", self._port, timeout=3600)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response, first = connection.getresponse(), 0.0
        while line := response.readline():
            if not first and b'"content"' in line and b'"content":""' not in line:
                first = time.perf_counter() - started
            if line.startswith(b"data: [DONE]"):
                break
        else:
            sys.exit(f"the server failed: status {response.status}")
        connection.close()
        if not first:
            sys.exit("an answer had no text: its first token cannot be timed")
        return Request(first, time.perf_counter() - started)

    def round(self, clients: int, requests: int, *, compressed: bool, shared: bool = False) -> Round:
        """So many clients, each with a request after the other."""
        bodies = [self.body(compressed=compressed, shared=shared) for _ in range(requests)]
        self._forget_peak()
        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            found = list(pool.map(self.ask, bodies))
        return Round(requests / (time.perf_counter() - started), found, self._peak_mb())

    def _forget_peak(self) -> None:
        for pid in _with_children(self._process.pid):
            Path(f"/proc/{pid}/clear_refs").write_text("5")

    def _peak_mb(self) -> float:
        """Of the server and the engine's processes; what they share counts in each."""
        peak = 0.0
        for pid in _with_children(self._process.pid):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    peak += int(line.split()[1]) / 1000
        return peak


def _with_children(pid: int) -> list[int]:
    found = [pid]
    for own in found:
        for thread in Path(f"/proc/{own}/task").iterdir():
            found += map(int, (thread / "children").read_text().split())
    return found


def told(name: str, rounds: list[Round]) -> str:
    """One line of the table."""
    firsts = sorted(one.first for own in rounds for one in own.requests)
    wholes = [one.whole for own in rounds for one in own.requests]
    p95 = firsts[min(len(firsts) - 1, round(0.95 * len(firsts)))]
    return (
        f"  {name:<12} {statistics.median(own.per_second for own in rounds):6.2f} requests/s   first token "
        f"{statistics.median(firsts):6.2f} s (p95 {p95:6.2f} s)   whole {statistics.median(wholes):6.2f} s   "
        f"peak {max(own.peak_mb for own in rounds):,.0f} MB"
    )


def ratios(rounds: dict[bool, list[Round]]) -> dict[str, float]:
    """Of compressed against text: how many times as fast."""

    def middle(side: bool, what: str) -> float:
        return statistics.median(getattr(one, what) for own in rounds[side] for one in own.requests)

    rates = {side: statistics.median(own.per_second for own in rounds[side]) for side in SIDES}
    return {
        "requests/s": rates[True] / rates[False],
        "first token": middle(False, "first") / middle(True, "first"),
        "whole": middle(False, "whole") / middle(True, "whole"),
    }


def plot(path: Path, found: dict[tuple[int, int], dict[bool, list[Round]]]) -> None:
    """Throughput over latency, a point for each number of clients."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(figsize=(6, 4))
    lines = {"text": [(clients, found[LAYERS[0], clients][False]) for clients in CLIENTS]}
    for layers in LAYERS:
        lines[f"compressed, {layers} layers"] = [
            (clients, found[layers, clients][True]) for clients in CLIENTS
        ]
    for name, points in lines.items():
        xs = [statistics.median(one.whole for own in rounds for one in own.requests) for _, rounds in points]
        ys = [statistics.median(own.per_second for own in rounds) for _, rounds in points]
        axes.plot(xs, ys, marker="o", label=name)
        for (clients, _), x, y in zip(points, xs, ys, strict=True):
            axes.annotate(str(clients), (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("seconds a request, median (numbers: clients)")
    axes.set_ylabel("requests a second")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--serve", type=int, metavar="LAYERS", help="be the server")
    flags.add_argument(
        "--engine",
        choices=("transformers", "openvino", "vllm"),
        default="transformers",
        help="what writes the answers",
    )
    flags.add_argument("--plot", metavar="FILE.svg", help="draw throughput over latency")
    options = flags.parse_args()
    if options.serve:
        serve(options.serve, options.engine)
        return
    print(f"{machine()}, {fast_dtype()}, {options.engine}")
    repeats = 1 if options.quick else 3
    clients_of = (1, 4) if options.quick else CLIENTS
    found: dict[tuple[int, int], dict[bool, list[Round]]] = {}
    for layers in LAYERS[: 1 if options.quick else None]:
        served = Served(layers, options.engine)
        for side in SIDES:
            served.round(1, 1, compressed=side)
        for clients in clients_of:
            rounds: dict[bool, list[Round]] = {side: [] for side in SIDES}
            # A round of many clients is long, and has many requests to take medians of.
            for _, side in itertools.product(range(repeats if clients <= 8 else 1), SIDES):
                rounds[side].append(served.round(clients, max(2, clients), compressed=side))
            found[layers, clients] = rounds
            print(f"{layers} layers, {clients} clients")
            for side in SIDES:
                print(told("compressed" if side else "text", rounds[side]))
            print(
                "  " + ", ".join(f"{name} {value:.2f}x" for name, value in ratios(rounds).items()), flush=True
            )
            if options.engine == "vllm" and layers == LAYERS[0]:  # it keeps the prefixes that prompts share
                served.round(1, 1, compressed=False, shared=True)
                shared = served.round(clients, max(2, clients), compressed=False, shared=True)
                print(told("text, shared", [shared]), flush=True)
        served.close()
    if options.plot:
        plot(Path(options.plot), found)
    fine = True
    if not options.quick:
        at_eight, alone = ratios(found[5, 8]), ratios(found[5, 1])
        first, whole = at_eight["first token"], alone["whole"]
        fine = verdict(
            "first token, 5 layers, 8 clients", f"{first:.2f}x", f"{FIRST_BAR}", met=first >= FIRST_BAR
        )
        fine &= verdict("whole, 5 layers, 1 client", f"{whole:.2f}x", f"{ALONE_BAR}", met=whole >= ALONE_BAR)
    last = found[5, clients_of[1]]
    close("serve", ratios(last)["requests/s"], 0.0 if options.quick else BAR, also=fine)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
