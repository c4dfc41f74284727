"""`inferneo doctor`: every check, in a world that is broken for it."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from server.cli.doctor import machine, setup
from server.cli.doctor.accelerator import accelerator
from server.cli.doctor.cli import examine
from server.cli.doctor.finding import Finding
from server.cli.doctor.machine import Survey
from server.cli.main import app
from server.config.settings import Settings
from server.keys.keyring import Keyring
from server.keys.store.open import open_store
from server.process.listening import Listener, listener_at
from tests.support.tiny_checkpoints import CHAT, EMBEDDING, tiny_checkpoints

CPU = {"platform": "cpu", "kinds": ["cpu"], "free_memory": 8e9, "machine_memory": 16e9}


@pytest.fixture(autouse=True)
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("INFERNEO_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("INFERNEO_CHECKPOINTS", str(tmp_path / "models"))
    monkeypatch.setenv("INFERNEO_KEYS_DB", str(tmp_path / "keys.db"))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models."""
    folder = tmp_path_factory.mktemp("sound")
    tiny_checkpoints(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of it, to be broken."""
    return Path(shutil.copytree(sound, tmp_path / "models"))


def only(found: Any) -> Finding:
    (finding,) = found
    return finding


# The machine


def test_packages_are_held_to_their_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "requires", lambda _: ["typer>=0.1", "ray>99; extra == 'ray'"])
    assert only(machine.packages()).state == "ok"
    monkeypatch.setattr(metadata, "requires", lambda _: ["typer>=99", "no-such-package>=1"])
    found = only(machine.packages())
    assert found.state == "problem"
    assert f"typer is {metadata.version('typer')}, not >=99" in found.text
    assert "no-such-package is missing" in found.text
    assert found.fix == "pip install 'typer>=99' 'no-such-package>=1'"


def test_a_package_that_is_not_installed_has_no_bounds() -> None:
    found = only(machine.packages("inferneo-that-is-not-there"))
    assert (found.state, found.fix) == ("warning", "pip install --editable .")


def test_a_driver_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    script = "import time; print('{\"kernels\": 1}', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    begin = time.monotonic()
    survey = machine.end_survey(process, 1.0)
    assert time.monotonic() - begin < 10
    assert survey == Survey({"kernels": 1}, "no answer within 1 s")  # what it had said is kept
    found = only(machine.devices(survey, served=False))
    assert found.state == "problem"
    assert "no answer within 1 s" in found.text
    assert "JAX_PLATFORMS=cpu" in found.fix


def test_a_platform_that_is_not_there_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_PLATFORMS", "nonsense")
    survey = machine.end_survey(machine.start_survey())
    found = only(machine.devices(survey, served=False))
    assert found.state == "problem"
    assert "nonsense" in found.text
    assert only(machine.devices(survey, served=True)).state == "warning"


@pytest.mark.parametrize(
    ("platform", "name", "extra"), [("gpu", "an NVIDIA GPU", "cuda12"), ("tpu", "a TPU", "tpu")]
)
def test_an_accelerator_that_jax_does_not_see_is_pointed_out(
    monkeypatch: pytest.MonkeyPatch, platform: str, name: str, extra: str
) -> None:
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    survey = Survey({"accelerator": None, "devices": CPU})
    assert only(machine.devices(survey, served=False)).state == "ok"
    found = only(
        machine.devices(
            Survey({"accelerator": {"platform": platform}, "devices": CPU}), served=False
        )
    )
    assert found.state == "warning"
    assert name in found.text
    assert found.fix == f"pip install 'inferneo-jax[{extra}]'"


def gpu_survey(driver: str | None, capability: str = "9.0") -> Survey:
    """The survey of a machine with a GPU."""
    flags = [{"variable": "A_FLAG", "value": "1", "why": "it is quick"}]
    found = {"platform": "gpu", "driver": driver, "flags": flags}
    return Survey({"accelerator": found, "devices": {"capability": capability}})


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The versions of the packages that a test says are installed, with JAX 0.10.2."""
    versions = {"jax": "0.10.2"}
    wanted = [f"jax-cuda{n}-plugin[with-cuda]==0.10.2; extra == 'cuda{n}'" for n in (12, 13)] + [
        "libtpu==0.0.42.*; extra == 'tpu'"
    ]

    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "requires", lambda _: wanted)
    monkeypatch.setattr(metadata, "version", version)
    return versions


def test_an_accelerator_is_described_with_its_flags(plugins: dict[str, str]) -> None:
    assert not list(accelerator(Survey({"accelerator": None})))
    assert not list(accelerator(gpu_survey("580.95.05")))  # told with the devices
    plugins["jax-cuda12-plugin"] = "0.10.2"
    found, flag = accelerator(gpu_survey("580.95.05"))
    assert (found.state, flag.state) == ("ok", "ok")
    assert "driver 580.95.05" in found.text
    assert "compute capability 9.0" in found.text
    assert flag.text == "A_FLAG: 1; it is quick"
    tpu = Survey({"accelerator": {"platform": "tpu", "driver": None, "flags": []}})
    plugins["libtpu"] = "0.0.42.1"
    assert only(accelerator(tpu)).text == "libtpu 0.0.42.1"


@pytest.mark.parametrize(
    ("plugin", "version", "driver", "text", "fix"),
    [
        ("jax-cuda12-plugin", "0.10.1", "580.95.05", "is 0.10.1, not ==0.10.2", "[cuda12]"),
        ("jax-cuda13-plugin", "0.10.2", "550.54.15", "580 or newer", "inferneo-jax[cuda12]"),
        ("jax-cuda12-plugin", "0.10.2", "470.256.02", "525 or newer", "update the NVIDIA driver"),
    ],
)
def test_a_plugin_must_fit_jax_and_the_driver(
    plugins: dict[str, str], plugin: str, version: str, driver: str, text: str, fix: str
) -> None:
    plugins[plugin] = version
    found = only(accelerator(gpu_survey(driver)))
    assert found.state == "problem"
    assert text in found.text
    assert fix in str(found.fix)


def test_a_libtpu_of_another_jax_is_a_problem(plugins: dict[str, str]) -> None:
    plugins["libtpu"] = "0.0.41"
    found = only(accelerator(Survey({"accelerator": {"platform": "tpu"}})))
    assert found.state == "problem"
    assert "which JAX 0.10.2 needs" in found.text
    assert str(found.fix).endswith("'inferneo-jax[tpu]'")


def test_a_gpu_without_kernels_is_a_warning(plugins: dict[str, str]) -> None:
    plugins["jax-cuda12-plugin"] = "0.10.2"
    found = only(accelerator(gpu_survey("580.95.05", "7.5")))
    assert found.state == "warning"


@pytest.mark.parametrize(("weights", "state"), [(1e9, "ok"), (5e9, "warning"), (9e9, "problem")])
def test_weights_must_fit_the_memory(weights: int, state: str) -> None:
    found = only(machine.memory(Survey({"devices": CPU}), weights))
    assert found.state == state
    assert "8.0 GB are free" in found.text
    assert bool(found.fix) == (state != "ok")


def test_models_to_fetch_must_fit_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2e9))
    folder = tmp_path / "not" / "yet"
    assert only(machine.disk(folder, int(0.5e9))).state == "ok"
    assert only(machine.disk(folder, int(1.1e9))).state == "problem"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e8))
    assert only(machine.disk(folder, 0)).state == "warning"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert only(machine.disk(folder, 1)).state == "problem"
    assert only(machine.disk(folder, 0)).state == "warning"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("compiler", "words"),
    [("no-such-compiler", "no C++ compiler was found"), ("false", "false cannot compile")],
)
def test_kernels_that_cannot_be_compiled_are_told(
    monkeypatch: pytest.MonkeyPatch, compiler: str, words: str
) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    survey = machine.end_survey(machine.start_survey())
    found = only(machine.kernels(survey, "auto"))
    assert found.state == "warning"
    assert words in found.text
    assert "apt-get install g++" in found.fix
    assert only(machine.kernels(survey, "native")).state == "problem"
    assert not list(machine.kernels(survey, "xla"))


# What was set up


def test_wrong_settings_are_problems_and_unknown_ones_warnings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("INFERNEO_SLTOS", "4")
    read, (warning, fine) = setup.settings({})
    assert read
    assert (warning.state, fine.state) == ("warning", "ok")
    assert "did you mean INFERNEO_SLOTS" in warning.text
    assert warning.fix == "unset INFERNEO_SLTOS"
    monkeypatch.setenv("INFERNEO_SLOTS", "0")
    monkeypatch.setenv("INFERNEO_PORT", "x")
    read, found = setup.settings({})
    assert read is None
    assert [each.state for each in found] == ["problem", "problem", "warning"]
    assert "INFERNEO_SLOTS is '0'; it must be at least 1." in found[0].text


def test_the_file_is_looked_at(tmp_path: Path) -> None:
    file = tmp_path / "inferneo.toml"
    file.write_text("slots = 2\n")
    _, (found,) = setup.settings({"config": str(file)})
    assert str(file) in found.text
    file.write_text("slots = 'x'\n")
    _, (found,) = setup.settings({"config": str(file)})
    assert found.state == "problem"


def test_sound_models_are_told_from_damaged_ones(folder: Path) -> None:
    read = Settings(models=(CHAT, EMBEDDING))
    assert [each.state for each, *_ in setup.models(read)] == ["ok", "ok"]
    (weights,) = (folder / CHAT).glob("model.*")
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / EMBEDDING / "inferneo.json").write_text("{")
    (chat, size, _), (embedding, _, _) = setup.models(read)
    assert (chat.state, embedding.state, size) == ("problem", "problem", 0)
    assert f"{weights} has " in chat.text
    assert chat.fix == f"inferneo rm {CHAT} && inferneo pull {CHAT}"


def test_models_that_are_not_there_are_to_be_fetched_or_unknown() -> None:
    read = Settings(models=("all-minilm-l6-v2", "org/some", "nosuch"))
    (known, size, missing), (some, *_), (nosuch, *_) = setup.models(read)
    assert (known.state, some.state, nosuch.state) == ("warning", "warning", "problem")
    assert size == missing == 83506384
    assert known.fix == "inferneo pull all-minilm-l6-v2"
    assert "smollm2-135m-instruct" in nosuch.text


def test_the_folder_of_programs_is_watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read = Settings(compilation_cache=tmp_path / "programs")
    assert "made at the first start" in only(setup.compiled(read)).text
    (tmp_path / "programs").mkdir(mode=0o755)
    for name, age in (("new", 0), ("old", 31 * 86_400)):
        (tmp_path / "programs" / name).write_bytes(bytes(1000))
        os.utime(tmp_path / "programs" / name, (time.time() - age,) * 2)
    found = only(setup.compiled(read))
    assert found.state == "ok"
    assert "2 files" in found.text
    assert "1 were not used for 30 days" in found.text
    (tmp_path / "programs").chmod(0o777)
    assert next(setup.compiled(read)).state == "problem"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert only(setup.compiled(read)).state == "warning"


def test_keys_must_go_with_the_other_settings(tmp_path: Path) -> None:
    def found(**settings: Any) -> tuple[str, str]:
        finding = next(setup.keys(Settings(**settings)))
        return finding.state, finding.text

    everywhere = {"host": "0.0.0.0"}
    assert found() == ("ok", "none yet, so only this machine is served, without one")
    assert found(**everywhere) == ("warning", "none, so other machines are refused")
    assert found(require_key="true")[0] == "problem"
    assert found(require_key="false")[0] == "ok"
    assert found(require_key="false", **everywhere)[0] == "warning"
    assert not (tmp_path / "keys.db").exists()  # it was looked for, not made

    store = open_store(tmp_path / "keys.db")
    ring = Keyring(store)
    ring.create("a")
    key, _ = ring.create("b")
    ring.revoke(key)
    assert found(**everywhere) == ("ok", "1 active of 2")
    ring.revoke(ring.find("a"))
    assert found()[0] == "warning"  # seen, though it lies in the log of who has it open
    store.close()
    assert found()[0] == "warning"


def test_a_store_that_is_damaged_or_open_to_others_is_told(tmp_path: Path) -> None:
    file = tmp_path / "keys.db"
    store = open_store(file)
    Keyring(store).create("a")
    store.close()
    file.chmod(0o644)
    fine, others = setup.keys(Settings())
    assert (fine.state, others.state) == ("ok", "warning")
    assert others.fix == f"chmod 600 {file}"
    file.write_bytes(file.read_bytes()[:5000].replace(b"SQLite", b"sqlITE"))
    found = only(setup.keys(Settings()))
    assert found.state == "problem"
    assert "cannot be read" in found.text
    with sqlite3.connect(tmp_path / "other.db") as database:
        database.execute("CREATE TABLE other (x)")
    assert only(setup.keys(Settings(keys_db=str(tmp_path / "other.db")))).state == "problem"


def test_a_redis_that_does_not_answer_is_a_problem() -> None:
    found = only(setup.keys(Settings(keys_db="redis://:secret@127.0.0.1:9/0")))
    assert found.state == "problem"
    assert "secret" not in found.text


def test_who_has_the_port_is_told() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        read = Settings(port=other.getsockname()[1])
        assert listener_at("127.0.0.1", read.port) is None
        other.listen()
        assert only(setup.port(read, None)).state == "problem"
        states = {None: "problem", "ready": "ok", "loading": "warning", "failed": "problem"}
        for status, state in states.items():
            assert only(setup.port(read, Listener(status))).state == state
    assert only(setup.port(read, None)).state == "ok"
    found = only(setup.port(Settings(host="192.0.2.1"), None))
    assert found.state == "problem"
    assert "no address of this machine" in found.text


# The command


def test_all_is_well_in_a_whole_world(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("INFERNEO_MODELS", f"{CHAT},{EMBEDDING}")
    monkeypatch.setenv("INFERNEO_PORT", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store = open_store(tmp_path / "keys.db")
    Keyring(store).create("a")
    store.close()
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(shown.output)
    assert (shown.exit_code, report["state"]) == (0, "ok"), report
    assert {each["check"] for each in report["checks"]} == {
        *("Python", "Devices", "Memory", "Kernels", "Settings", "Disk"),
        *("Model", "Compiled", "Keys", "Port"),
    }
    (kernels,) = (each for each in report["checks"] if each["check"] == "Kernels")
    assert "at the first start" in kernels["text"]
    assert sorted(tmp_path.rglob("*")) == before  # nothing was made, the kernels neither


def test_a_problem_is_an_exit_status_and_comes_with_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_SLOTS", "0")
    monkeypatch.setattr(machine, "start_survey", _no_survey)
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "80"})
    assert shown.exit_code == 1
    assert "problem  Settings" in shown.output
    assert "models, keys and port were not looked at" in shown.output
    assert shown.output.rstrip().endswith("1 problem, 1 warning.")
    assert max(map(len, shown.output.splitlines())) <= 80


def test_the_survey_never_outlives_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(machine, "start_survey", lambda: started.append(_no_survey()) or started[0])
    report = examine({})
    next(report)
    report.close()
    assert started[0].poll() is not None


def _no_survey() -> subprocess.Popen[str]:
    """One that finds a CPU, quickly."""
    line = json.dumps({"devices": CPU})
    command = [sys.executable, "-c", f"print({line!r})"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
