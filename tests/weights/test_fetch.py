import dataclasses
import hashlib
import json
import os
import sys
import threading
import zipfile
import zlib
from pathlib import Path

import pytest

from inferneo_jax.errors import CheckpointError, FetchError
from inferneo_jax.weights import packages
from inferneo_jax.weights.catalog import (
    CatalogEntry,
    checkpoint_path,
    list_checkpoints,
    list_downloads,
    load_catalog,
    remove_checkpoint,
)
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.fetch import pull
from inferneo_jax.weights.packages import Deflated, Packages, Part
from tests.support.killed import KILLS
from tests.support.puller import killed_pulls

_PYTHON = sys.executable


class Shop:
    """A folder of wheels that pip downloads from, and a catalog of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.catalog: dict[str, CatalogEntry] = {}
        folder.mkdir()

    def wheel(self, name: str, files: dict[str, bytes]) -> Path:
        info = f"{name}-1.0.dist-info"
        files = files | {
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n".encode(),
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            f"{info}/RECORD": b"",
        }
        wheel = self.folder / f"{name}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                archive.writestr(path, content)
        return wheel

    def part(self, name: str, content: bytes) -> Part:
        """A wheel with one member."""
        wheel = self.wheel(name, {f"{name}/data.bin": content})
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        return Part(
            requirement=f"{name}==1.0", sha256=digest, size=len(content), member=f"{name}/data.bin"
        )

    def parts(self, name: str, content: bytes, count: int) -> tuple[Part, ...]:
        """Wheels that carry ``content``, one piece each."""
        size = -(-len(content) // count)
        pieces = [content[at : at + size] for at in range(0, len(content), size)]
        return tuple(self.part(f"{name}{i}", piece) for i, piece in enumerate(pieces, 1))

    def enter(self, name: str, content: bytes, *sources, **more) -> None:
        """Add a model to the catalog."""
        values = {
            "kind": "chat",
            "file": "m.gguf",
            "sha256": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "licence": "Apache-2.0",
            "description": "a tiny one",
        }
        self.catalog[name] = CatalogEntry(name=name, sources=sources, **values | more)

    def add_folder(self, name: str, files: dict[str, bytes], folder: str) -> None:
        """Add a model that is a folder of a wheel."""
        wheel = self.wheel(name, files)
        content = wheel.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        part = Part(requirement=f"{name}==1.0", sha256=digest, size=len(content))
        self.enter(name, content, Packages(parts=(part,)), file=wheel.name, unpack=folder)


def packed(content: bytes) -> tuple[bytes, Deflated]:
    """An archive of other things that has ``content`` compressed in the middle."""
    compressor = zlib.compressobj(wbits=-15)
    data = compressor.compress(content) + compressor.flush()
    before = os.urandom(len(data) // 2)
    return before + data + os.urandom(1000), Deflated(start=len(before), size=len(data))


@pytest.fixture
def shop(made, tmp_path, monkeypatch):
    """One model in each way of assembly: folder, whole file, parts, compressed in parts."""
    shop = Shop(tmp_path / "wheels")
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    files = {f"pkg/model/{f.name}": f.read_bytes() for f in folder.iterdir()}
    shop.add_folder("tiny", files | {"pkg/__init__.py": b"raise SystemExit"}, "pkg/model")
    file = made.gguf(tmp_path / "m.gguf", made.LLAMA, made.tensors(made.LLAMA))
    content = shop.content = file.read_bytes()
    shop.enter("packed", content, Packages(parts=(shop.part("packed", content),)))
    shop.enter("split", content, Packages(parts=shop.parts("split", content, 3)))
    archive, deflated = packed(content)
    monkeypatch.setattr(packages, "_PIECE_BYTES", 50_000)
    monkeypatch.setattr(packages, "CHUNK", 20_000)
    parts = shop.parts("deflated", archive, 2)
    shop.enter("deflated", content, Packages(parts=parts, deflated=deflated))
    # Starting pip takes a second; most tests need only what it does.
    pip = tmp_path / "pip"
    pip.write_text(_PIP.format(folder=shop.folder))
    pip.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(pip))
    return shop


_PIP = """#!/bin/sh
while [ "$1" != --dest ]; do shift; done
cp {folder}/"${{3%%==*}}"-*.whl "$2"
"""


@pytest.fixture
def real_pip(shop, monkeypatch):
    """The shop as an index of the real pip."""
    monkeypatch.setattr("sys.executable", _PYTHON)
    for name, value in {
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(shop.folder),
        "PIP_CONFIG_FILE": "/dev/null",
    }.items():
        monkeypatch.setenv(name, value)
    return shop


@pytest.mark.parametrize("name", ["tiny", "packed", "split", "deflated"])
def test_a_pulled_model_is_whole_and_pulled_once(real_pip, tmp_path, name):
    shop = real_pip
    store, stages = tmp_path / "store", []
    path = pull(name, store, lambda *s: stages.append(s), catalog=shop.catalog)
    info = read_info(path)
    assert (info.licence, info.source["catalog"]) == ("Apache-2.0", name)
    assert [p.name for p in store.iterdir()] == [name]
    assert list(dict.fromkeys(s[0] for s in stages)) == ["downloading", "checking"]
    size = shop.catalog[name].size
    counts = [s[1:] for s in stages if s[0] == "downloading"]
    assert counts == sorted(counts)
    assert counts[-1] == (size, size)
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
    assert sum(stage == "checking" and not done for stage, done, _ in stages) == 1


@pytest.mark.parametrize("stage", ["downloading", "checking"])
@pytest.mark.parametrize("name", ["tiny", "split", "deflated"])
def test_an_interrupted_pull_leaves_no_checkpoint_and_can_be_repeated(shop, tmp_path, name, stage):
    store = tmp_path / "store"

    def interrupt(now, done, total):
        if now == stage and done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as raised:
        pull(name, store, interrupt, catalog=shop.catalog)
    assert list_checkpoints(store) == {}
    assert [path.name for path in store.iterdir()] == [f".{name}.download"]
    assert raised.tb  # which still holds all that the first one has called
    read_info(pull(name, store, catalog=shop.catalog))
    assert [path.name for path in store.iterdir()] == [name]


def test_parts_that_are_here_are_not_downloaded_again(shop, tmp_path):
    store, stages = tmp_path / "store", []
    last = next(shop.folder.glob("split3*"))
    last.rename(tmp_path / last.name)
    with pytest.raises(FetchError, match=r"split3==1\.0"):
        pull("split", store, catalog=shop.catalog)
    (kept,) = list_downloads(store).values()
    assert kept == sum(part.size for part in shop.catalog["split"].sources[0].parts[:2])
    for wheel in shop.folder.glob("split*"):
        wheel.unlink()
    (tmp_path / last.name).rename(last)
    read_info(pull("split", store, lambda *s: stages.append(s), catalog=shop.catalog))
    assert stages[0] == ("verifying", kept, len(shop.content))
    assert list_downloads(store) == {}


def test_a_pull_stores_one_wheel_beside_the_file(shop, tmp_path):
    store, most = tmp_path / "store", 0

    def look(stage, done, total):
        nonlocal most
        if stage == "downloading":
            wheels = store / ".split.download" / "wheel" / "done"
            most = max(most, len(list(wheels.glob("*.whl"))))

    pull("split", store, look, catalog=shop.catalog)
    assert most == 1


def test_compressed_data_gives_way_to_what_it_holds(shop, tmp_path):
    store, most = tmp_path / "store", 0

    def look(stage, done, total):
        nonlocal most
        folder = store / ".deflated.download"
        most = max(most, sum(file.stat().st_size for file in folder.glob("*.partial")))

    pull("deflated", store, look, catalog=shop.catalog)
    assert most < 1.4 * len(shop.content)


def test_kept_bytes_that_were_damaged_are_fetched_again(shop, tmp_path):
    store = tmp_path / "store"
    last = next(shop.folder.glob("split3*"))
    last.rename(tmp_path / last.name)
    with pytest.raises(FetchError):
        pull("split", store, catalog=shop.catalog)
    (partial,) = store.rglob("*.partial")
    partial.write_bytes(bytes(partial.stat().st_size))
    (tmp_path / last.name).rename(last)
    read_info(pull("split", store, catalog=shop.catalog))


def test_the_next_source_continues_where_one_broke_off(shop, tmp_path):
    first, second = shop.parts("one", shop.content, 3), shop.parts("two", shop.content, 4)
    next(shop.folder.glob("one3*")).unlink()
    next(shop.folder.glob("two1*")).unlink()
    shop.enter("both", shop.content, Packages(parts=first), Packages(parts=second))
    read_info(pull("both", tmp_path / "store", catalog=shop.catalog))


def test_a_source_of_other_content_is_passed_over(shop, tmp_path):
    other = bytes(len(shop.content))
    sources = [shop.parts("bad", other, 2), shop.parts("long", shop.content + b"0", 2)]
    sources += [shop.parts("good", shop.content, 2)]
    shop.enter("third", shop.content, *(Packages(parts=parts) for parts in sources))
    read_info(pull("third", tmp_path / "store", catalog=shop.catalog))


def test_when_all_sources_fail_each_is_named_with_its_reason(shop, tmp_path):
    gone = shop.parts("gone", shop.content, 2)
    next(shop.folder.glob("gone1*")).unlink()
    bad = shop.parts("bad", bytes(len(shop.content)), 2)
    shop.enter("none", shop.content, Packages(parts=gone), Packages(parts=bad))
    with pytest.raises(FetchError) as raised:
        pull("none", tmp_path / "store", catalog=shop.catalog)
    first, second, third = str(raised.value).splitlines()
    assert first == "m.gguf could not be downloaded from any source:"
    assert second.startswith("  the packages gone1==1.0 to gone2==1.0: pip could not download")
    assert hashlib.sha256(shop.content).hexdigest() in third
    assert list((tmp_path / "store").iterdir()) == []


@pytest.mark.parametrize("name", ["split", "deflated"])
def test_a_pull_of_parts_killed_at_any_time_is_continued_by_the_next(shop, tmp_path, name):
    """The number of kills is that of the variable INFERNEO_TEST_KILLS."""
    store, catalog, pip = tmp_path / "store", tmp_path / "catalog.toml", Path(sys.executable)
    slow = tmp_path / "slow"
    # It goes on for a while when whoever started it is killed.
    busy = "for i in 1 2 3 4 5 6 7 8 9; do echo >$TMPDIR/$i && sleep 0.01; done\n"
    slow.write_text(pip.read_text() + busy)
    slow.chmod(0o755)
    entry = shop.catalog[name]
    catalog.write_text(as_toml(entry))
    assert load_catalog(catalog) == {name: entry}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.executable", _PYTHON)
        for _ in killed_pulls(KILLS, 0.8, store, name, catalog, slow):
            for found, folder in list_checkpoints(store).items():
                assert read_info(folder).kind == "decoder"
                remove_checkpoint(store, found)
    read_info(pull(name, store, catalog=shop.catalog))
    assert [path.name for path in store.iterdir()] == [name]


def as_toml(entry: CatalogEntry) -> str:
    """A catalog of one model whose only source is packages."""
    (source,) = entry.sources
    keys = ("kind", "description", "licence", "file", "sha256", "size")
    lines = [f"[{entry.name}]", *(f"{key} = {json.dumps(getattr(entry, key))}" for key in keys)]
    lines.append(f"[[{entry.name}.sources]]")
    if source.deflated:
        lines.append(f"deflated = {inline(source.deflated)}")
    lines.append(f"parts = [{', '.join(inline(part) for part in source.parts)}]")
    return "\n".join(lines)


def inline(values) -> str:
    pairs = dataclasses.asdict(values).items()  # of strings and integers
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in pairs) + " }"


def test_compressed_data_is_bounded_and_checked(shop, tmp_path):
    for name, content in {
        "bomb": bytes(len(shop.content) * 50),
        "short": shop.content[:-9],
    }.items():
        archive, deflated = packed(content)
        source = Packages(parts=shop.parts(name, archive, 2), deflated=deflated)
        shop.enter(name, shop.content, source)
        with pytest.raises(FetchError, match=r"holds more than|ended after"):
            pull(name, tmp_path / "store", catalog=shop.catalog)
    torn = Deflated(start=deflated.start + 7, size=deflated.size - 7)
    shop.enter("torn", shop.content, Packages(parts=source.parts, deflated=torn))
    with pytest.raises(FetchError):
        pull("torn", tmp_path / "store", catalog=shop.catalog)


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
    shop.add_folder("evil", {"pkg/model/config.json": b"{}", path: b"{}"}, "pkg/model")
    with pytest.raises(FetchError, match="leads outside"):
        pull("evil", tmp_path / "store", catalog=shop.catalog)
    assert not list(tmp_path.rglob("*evil.json"))


def test_a_wheel_without_the_model_is_refused(shop, tmp_path):
    shop.add_folder("empty", {"pkg/modelling.py": b""}, "pkg/model")
    with pytest.raises(FetchError, match="has no pkg/model"):
        pull("empty", tmp_path / "store", catalog=shop.catalog)


def test_what_pip_cannot_find_says_what_to_do(real_pip, tmp_path):
    shop = real_pip
    next(shop.folder.glob("tiny*")).unlink()
    with pytest.raises(FetchError) as raised:
        pull("tiny", tmp_path / "store", catalog=shop.catalog)
    assert "tiny==1.0" in str(raised.value)
    assert "check the network and pip's index" in str(raised.value)


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
    assert kinds == {
        "smollm2-135m-instruct": "chat",
        "all-minilm-l6-v2": "embedding",
        "qwen2.5-coder-0.5b-instruct": "chat",
        "qwen2.5-coder-1.5b-instruct": "chat",
        "nomic-embed-text-v1.5": "embedding",
    }
    for entry in catalog.values():
        mirror = entry.sources[-1]
        parts = mirror.parts
        assert all("==" in part.requirement for part in parts)
        for digest in (entry.sha256, *(part.sha256 for part in parts)):
            assert len(bytes.fromhex(digest)) == 32
        carried = sum(part.size for part in parts)
        if mirror.deflated is None:
            assert carried == entry.size
        else:
            assert mirror.deflated.start + mirror.deflated.size <= carried
            assert mirror.deflated.start < parts[0].size


def test_a_damaged_catalog_is_an_error(tmp_path):
    (tmp_path / "c.toml").write_text("[a]\nkind = 'chat'\n")
    with pytest.raises(CheckpointError, match=r"c\.toml"):
        load_catalog(tmp_path / "c.toml")
