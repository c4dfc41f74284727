import errno
import hashlib
import json
import random
import threading
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from inferneo_jax.errors import CheckpointError, FetchError, InferneoError
from inferneo_jax.weights.catalog import (
    CatalogEntry,
    checkpoint_path,
    list_checkpoints,
    list_downloads,
    remove_checkpoint,
)
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.download import RemoteFile, Tally, download
from inferneo_jax.weights.fetch import pull
from inferneo_jax.weights.hub import HubFile
from tests.support.fake_hub import hub
from tests.support.killed import KILLS
from tests.support.puller import killed_pulls

__all__ = ["hub"]


@pytest.fixture
def gguf(made, tmp_path):
    """The content of a small model's file."""
    return made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA)).read_bytes()


def folder_files(made, folder, config):
    made.folder(folder, config)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_repository_of_safetensors_is_pulled_whole(made, hub, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.BERT)
    others = dict.fromkeys(["pytorch_model.bin", "onnx/model.json", "x.Q8_0.gguf", "a.h5"], b"no")
    hub.add("org/name", files | others, sha="b" * 40)
    store, offers, stages = tmp_path / "store", [], []
    path = pull("org/name", store, lambda *s: stages.append(s), announce=offers.append)
    assert path == store / "org" / "name"
    info = read_info(path)
    assert (info.source["revision"], info.source["repository"]) == ("b" * 40, "org/name")
    assert info.licence == "apache-2.0"
    size = sum(map(len, files.values()))
    (offer,) = offers
    assert (offer.size, offer.kept, offer.licence) == (size, 0, "apache-2.0")
    assert ("downloading", size, size) in stages
    asked = {path.rpartition("/")[2] for path, _ in hub.downloads()}
    assert asked == set(files)
    assert [p.name for p in (store / "org").iterdir()] == ["name"]


def test_a_quantization_is_a_model_of_its_own_beside_the_repository(made, hub, gguf, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.BERT)
    hub.add("org/name", files | {"m-Q4_K_M.gguf": gguf, "m-Q8_0.gguf": gguf + b"0"})
    store, offers = tmp_path / "store", []
    for name in ("org/name", "org/name:Q4_K_M", "org/name:m-Q4_K_M.gguf"):
        pull(name, store, announce=offers.append)
    assert offers[1].file == offers[2].file == "m-Q4_K_M.gguf"
    assert offers[1].others == ("Q8_0",)
    assert read_info(store / "org/name").kind == "encoder"
    assert read_info(store / "org/name:Q4_K_M").kind == "decoder"
    with pytest.raises(CheckpointError, match="within the model"):
        checkpoint_path(store, "org/name/x")
    for name in list(list_checkpoints(store)):
        remove_checkpoint(store, name)
    assert list(store.iterdir()) == []
    with pytest.raises(CheckpointError, match="no model"):
        remove_checkpoint(store, "org/name")


def test_of_several_quantizations_the_best_that_fits_is_pulled_with_the_reason(
    hub, gguf, tmp_path, monkeypatch
):
    sizes = {"Q2_K": 10, "Q4_K_M": 20, "Q8_0": 40}
    hub.add("org/g", {f"m-{label}.gguf": gguf + bytes(n) for label, n in sizes.items()})
    free = int((len(gguf) + 30) * 1.25)
    monkeypatch.setattr("inferneo_jax.weights.fetch.free_host_memory", lambda: free)
    offers = []
    path = pull("org/g", tmp_path, announce=offers.append)
    assert offers[0].file == "m-Q4_K_M.gguf"
    assert "the largest of 3 that fits" in offers[0].why
    assert read_info(path).source["sha256"]


def test_the_last_bytes_of_an_interrupted_pull_are_asked_for(hub, gguf, tmp_path):
    hub.add("org/g", {"m.gguf": gguf})
    hub.cut = [100_000, 0, 0, 0]
    with pytest.raises(FetchError, match="check the network"):
        pull("org/g", tmp_path)
    assert list_downloads(tmp_path) == {"org/g": 100_000}
    hub.cut = []
    hub.requests.clear()
    offers, stages = [], []
    pull("org/g", tmp_path, lambda *s: stages.append(s), announce=offers.append)
    assert offers[0].kept == 100_000
    assert stages[0] == ("verifying", 100_000, len(gguf))
    assert [span for _, span in hub.downloads()] == ["bytes=100000-"]
    assert list_downloads(tmp_path) == {}


@pytest.mark.parametrize("refuse_ranges", [False, True])
def test_a_connection_that_breaks_is_made_again(hub, gguf, tmp_path, refuse_ranges):
    hub.add("org/g", {"m.gguf": gguf})
    hub.refuse_ranges = refuse_ranges
    hub.cut = [50_000, 60_000, 70_000]
    read_info(pull("org/g", tmp_path))
    assert len(hub.downloads()) == 4


@pytest.mark.parametrize("path", ["model.safetensors", "config.json"])
def test_content_that_the_hub_did_not_promise_is_refused(made, hub, tmp_path, path):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    hub.add("org/name", files)
    hub.swapped[path] = bytes(len(files[path]))
    with pytest.raises(FetchError, match="its content is not"):
        pull("org/name", tmp_path / "store")
    hub.swapped.clear()
    read_info(pull("org/name", tmp_path / "store"))


def test_a_repository_that_the_disk_cannot_hold_is_refused_before_a_byte(
    made, hub, tmp_path, monkeypatch
):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    hub.add("org/name", files)
    size = sum(map(len, files.values()))
    free = SimpleNamespace(free=size - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)
    with pytest.raises(FetchError, match=r"0\.00 GB are missing, .* name another folder"):
        pull("org/name", tmp_path / "store")
    assert hub.downloads() == []
    assert list((tmp_path / "store").iterdir()) == []
    free.free = size
    read_info(pull("org/name", tmp_path / "store"))


def test_files_of_the_same_content_are_told_apart(made, hub, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    hub.add("org/name", files | {f"{i}.txt": bytes(100_000) for i in range(4)})
    hub.seconds_per_piece = 0.002
    read_info(pull("org/name", tmp_path / "store"))


def test_a_download_is_kept_when_the_checkpoint_cannot_be_stored(hub, gguf, tmp_path, monkeypatch):
    hub.add("org/g", {"m.gguf": gguf})

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("inferneo_jax.weights.checkpoint._write_json", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            pull("org/g", tmp_path)
    assert list_downloads(tmp_path) == {"org/g": len(gguf)}
    hub.requests.clear()
    read_info(pull("org/g", tmp_path))
    assert hub.downloads() == []


def test_files_that_are_complete_are_kept_when_another_fails(made, hub, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    hub.add("org/name", files)
    hub.swapped["model.safetensors"] = bytes(len(files["model.safetensors"]))
    hub.seconds_per_piece = 0.02  # the others are small
    with pytest.raises(FetchError):
        pull("org/name", tmp_path / "store")
    hub.swapped.clear()
    hub.requests.clear()
    read_info(pull("org/name", tmp_path / "store"))
    assert [path.rpartition("/")[2] for path, _ in hub.downloads()] == ["model.safetensors"]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_file_of_the_hubs_own_cache_is_linked_if_it_is_right(hub, gguf, tmp_path, damaged):
    blobs = tmp_path / "hub" / "models--org--g" / "blobs"
    blobs.mkdir(parents=True)
    blob = blobs / hashlib.sha256(gguf).hexdigest()
    content = bytes(len(gguf)) if damaged else gguf
    blob.write_bytes(content)
    hub.add("org/g", {"m.gguf": gguf})
    path = pull("org/g", tmp_path / "store")
    assert (path / "model.gguf").read_bytes() == gguf
    assert blob.samefile(path / "model.gguf") != damaged
    assert blob.read_bytes() == content
    assert len(hub.downloads()) == damaged


def test_another_revision_starts_anew_and_drops_what_was_kept(hub, gguf, tmp_path):
    hub.add("org/g", {"m.gguf": bytes(len(gguf))})
    hub.cut = [100_000, 0, 0, 0]
    with pytest.raises(FetchError):
        pull("org/g", tmp_path)
    hub.add("org/g", {"m.gguf": gguf}, sha="c" * 40)
    hub.cut = []
    offers = []
    path = pull("org/g", tmp_path, announce=offers.append)
    assert offers[0].kept == 0
    assert read_info(path).source["revision"] == "c" * 40


def test_a_gated_repository_says_what_to_do_and_opens_to_a_token(hub, gguf, tmp_path, monkeypatch):
    hub.add("org/g", {"m.gguf": gguf}, gated=True)
    for token in (None, "hf_wrong"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(FetchError, match=r"gated: accept its terms .* HF_TOKEN"):
            pull("org/g", tmp_path)
        assert list(tmp_path.glob("org")) == []
    monkeypatch.setenv("HF_TOKEN", hub.token)
    read_info(pull("org/g", tmp_path))
    # The storage is another host, which must not learn the token.
    sent = {path.split("/")[1]: token for path, _, token in hub.requests}
    assert sent == {"api": f"Bearer {hub.token}", "org": f"Bearer {hub.token}", "storage": None}


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("org/none", None, "check the spelling"),
        ("a/b/c", None, "cannot name a repository"),
        ("org/name", {"model.bin": b""}, "no GGUF files, and no config.json with safetensors"),
        ("org/name:Q4_0", {"config.json": b"{}"}, "has no GGUF files"),
        ("org/name:Q4_0", {"m-Q8_0.gguf": b""}, "org/name: it has no GGUF 'Q4_0'; there are Q8_0"),
        ("org/name:n.gguf", {"m-Q8_0.gguf": b""}, "it has no GGUF 'n.gguf'"),
        ("org/name", {"../../m.gguf": b"", "/m.gguf": b""}, "has no GGUF files"),
    ],
)
def test_what_cannot_be_pulled_says_why(hub, tmp_path, name, files, words):
    if files is not None:
        hub.add("org/name", files)
    with pytest.raises(FetchError, match=words):
        pull(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("files", "more", "words"),
    [
        (
            {"m.gguf": b"GGUF"},
            {"gguf": {"architecture": "gpt-oss"}},
            "org/name is a GGUF of the architecture 'gpt-oss'; those read are llama",
        ),
        (
            {"config.json": b"{}", "model.safetensors": b""},
            {"config": {"architectures": ["MambaForCausalLM"]}},
            "the architecture 'MambaForCausalLM' is not supported",
        ),
    ],
)
def test_a_model_that_is_not_supported_is_refused_before_it_is_downloaded(
    hub, tmp_path, files, more, words
):
    hub.add("org/name", files, more=more)
    with pytest.raises(InferneoError, match=words):
        pull("org/name", tmp_path)
    assert hub.downloads() == []
    assert list(tmp_path.iterdir()) == []


def test_a_configuration_that_is_not_supported_leaves_nothing(made, hub, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    config = json.dumps(made.LLAMA | {"hidden_act": "relu"})
    hub.add("org/name", files | {"config.json": config.encode()})
    with pytest.raises(InferneoError, match="hidden_act"):
        pull("org/name", tmp_path / "store")
    assert list((tmp_path / "store").iterdir()) == []


def test_a_file_that_is_not_a_model_leaves_nothing(hub, tmp_path):
    hub.add("org/g", {"m.gguf": b"GGUF" + bytes(50_000)})
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        pull("org/g", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_hub_that_is_not_there_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FetchError, match="check the network, or download it elsewhere"):
        pull("org/name", tmp_path)


def test_a_catalog_model_of_the_hub_is_refused_before_a_byte_if_it_is_another(hub, gguf, tmp_path):
    hub.add("org/g", {"m.gguf": gguf})
    entry = CatalogEntry(
        name="m",
        kind="chat",
        description="",
        licence="",
        file="m.gguf",
        sha256="0" * 64,
        size=len(gguf),
        sources=(HubFile(repository="org/g", path="m.gguf"),),
    )
    with pytest.raises(FetchError, match=r"org/g on the Hugging Face Hub: m\.gguf is not 0000"):
        pull("m", tmp_path / "store", catalog={"m": entry})
    assert list((tmp_path / "store").iterdir()) == []


def test_a_pull_killed_at_any_time_is_continued_by_the_next(hub, gguf, tmp_path):
    """The number of kills is that of the variable INFERNEO_TEST_KILLS."""
    content = gguf + random.Random(0).randbytes(3 << 20)
    hub.add("org/g", {"m-Q4_K_M.gguf": content, "m-Q8_0.gguf": b""})
    hub.seconds_per_piece = 0.002
    store, name, kept = tmp_path / "store", "org/g:Q4_K_M", 0
    for _ in killed_pulls(KILLS, 1.0, store, name, HF_ENDPOINT=hub.url):
        for found, folder in list_checkpoints(store).items():
            assert read_info(folder).kind == "decoder", found
            remove_checkpoint(store, name)  # it was quick: begin again
            kept = 0
        now = sum(list_downloads(store).values())
        assert now >= kept
        kept = now
    hub.seconds_per_piece = 0.0
    hub.requests.clear()
    path = pull(name, store)
    assert read_info(path).kind == "decoder"
    spans = [span for _, span in hub.downloads()]
    assert spans == ([] if kept == len(content) else [f"bytes={kept}-" if kept else None])
    assert [each.name for each in (store / "org").iterdir()] == ["g:Q4_K_M"]


def test_files_are_downloaded_several_at_a_time_and_end_together(made, hub, tmp_path):
    files = folder_files(made, tmp_path / "hf", made.LLAMA)
    hub.add("org/name", files | {f"{i}.txt": bytes([i]) * 400_000 for i in range(6)})
    hub.seconds_per_piece = 0.01  # 0.25 s each
    total, counts = sum(map(len, hub.repos["org/name"].files.values())), []
    seen, stopped = set(), []

    def watch(stage, done, total):
        seen.add(threading.current_thread().name)
        counts.append(done)
        if stopped or done > total / 2:
            stopped.append(stage)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull("org/name", tmp_path / "store", watch)
    assert len(seen) > 1
    assert len(stopped) == 1
    assert total / 2 < counts[-1] < total
    (kept,) = list_downloads(tmp_path / "store").values()
    assert kept >= counts[-1]
    hub.seconds_per_piece = 0.0
    read_info(pull("org/name", tmp_path / "store"))


def test_a_download_ends_with_the_error_of_whoever_ended_it(tmp_path):
    ended = threading.Event()

    class Waits:
        """A source whose first file takes a while to be closed, and whose second ends meanwhile."""

        def cached(self, file):
            return None

        def read(self, file, offset, scratch, arrived):
            try:
                if file.path == "second":
                    ended.wait(5)
                yield bytes(file.size)
            finally:
                if file.path == "first":
                    ended.set()
                    time.sleep(0.2)

    def watch(stage, done, total):
        raise KeyboardInterrupt

    names = ("first", "second")
    files = [(RemoteFile(path=name, size=10, digest=""), [Waits()]) for name in names]
    with pytest.raises(KeyboardInterrupt):
        download(files, tmp_path, Tally(watch, 20))
