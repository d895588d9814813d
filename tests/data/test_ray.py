"""A run on a Ray cluster of two nodes on this machine has the same bytes, also if a node is lost."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from scaledown.errors import UsageError

PLACE = Path("/tmp") / f"scaledown-ray-{os.getpid()}"
os.environ["RAY_TMPDIR"] = str(PLACE)  # read when it is imported
ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow

RERANK = ("--enable_reranking", "--top_k_retrieval", "6", "--top_k_reranking", "3")
SHARDS = ("--queries_per_shard", "2", "--passages_per_shard", "8")


@pytest.fixture
def cluster(tmp_path_factory, monkeypatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    quick = {"period_ms": "1000", "timeout_ms": "1000", "failure_threshold": "3"}
    for name, value in quick.items():
        monkeypatch.setenv(f"RAY_health_check_{name}", value)
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (PLACE / "ray").mkdir(parents=True, exist_ok=True)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(PLACE, ignore_errors=True)


def test_run_has_the_same_bytes_after_a_node_is_lost(cluster, prepare, queries, tmp_path, capsys) -> None:
    queries.write_text("".join(f"What is number {number}?\n" for number in range(24)))
    whole = tmp_path / "whole.json"
    assert prepare(*RERANK, *SHARDS, "--output_file", str(whole)) == 0
    other = next(node for node in cluster.list_all_nodes() if not node.head)
    met = []

    def remove() -> None:
        while not list(prepare.work.glob("vectors/*/*.arrow")):
            time.sleep(0.05)
        met.append(len(list(prepare.work.glob("*/*/*.arrow"))))
        cluster.remove_node(other, allow_graceful=False)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    assert prepare(*RERANK, *SHARDS, "--executor", "ray", "--workers", "2") == 0
    remover.join()
    assert met
    assert "is dead" in capsys.readouterr().err, "a worker was there"
    deadline = time.monotonic() + 90  # Ray asks a node several times before it counts as lost
    while sum(node["Alive"] for node in ray.nodes()) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert prepare.output.read_bytes() == whole.read_bytes()
    made = [
        f"{path.parent.parent.name}/{event['shard']}"
        for path in prepare.work.glob("*/*/journal.jsonl")
        for event in map(json.loads, path.read_text().splitlines())
    ]
    assert len(made) - len(set(made)) <= 1


def test_missing_cluster_is_an_error() -> None:
    from scaledown.run.ray_pool import RayPool

    with pytest.raises(UsageError, match="no Ray cluster answers.*ray start"):
        RayPool("127.0.0.1:1", 1, 1)
