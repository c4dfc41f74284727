"""Settings: variables, the file, and what is said when they are wrong."""

import os
import re
from pathlib import Path

import pytest

from inferneo_jax import ConfigError
from inferneo_jax.config import MeshShape
from server.config.replica_settings import ReplicaSettings
from server.config.schema import setting_docs
from server.config.settings import Settings, unknown_variables
from server.models.sources import sources_of


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in os.environ:
        if name.startswith("INFERNEO_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("INFERNEO_CHECKPOINTS", str(tmp_path))


@pytest.fixture
def file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "inferneo.toml"
    monkeypatch.setenv("INFERNEO_CONFIG", str(path))
    return path


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFERNEO_MODELS", "a, org/b ,")
    monkeypatch.setenv("INFERNEO_ALIASES", "gpt-4o=a, ada=org/b")
    monkeypatch.setenv("INFERNEO_SLOTS", "7")
    monkeypatch.setenv("INFERNEO_MAX_LEN", "99")
    monkeypatch.setenv("INFERNEO_MESH", "data=2, model=4")
    monkeypatch.setenv("INFERNEO_DTYPE", "float32")
    settings = Settings.load()
    assert settings.models == ("a", "org/b")
    assert settings.aliases == {"gpt-4o": "a", "ada": "org/b"}
    config = settings.engine_config()
    assert (config.slots, config.max_len, config.dtype) == (7, 99, "float32")
    assert config.mesh == MeshShape(2, 4)
    assert config.compilation_cache == str(tmp_path / ".compiled")


def test_variables_win_over_the_file(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text('slots = 3\nmax_len = 50\nmodels = ["a"]\n[aliases]\nx = "a"\n')
    monkeypatch.setenv("INFERNEO_SLOTS", "4")
    settings = Settings.load()
    assert (settings.slots, settings.max_len) == (4, 50)
    assert (settings.models, settings.aliases) == (("a",), {"x": "a"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SLOTS", "many", "an integer"),
        ("SLOTS", "0", "at least 1"),
        ("SLOTS", "257", "at most 256"),
        ("MAX_LEN", "1", "at least 2"),
        ("MESH", "model=many", "write it as data=1,model=8"),
        ("DTYPE", "int4", "'auto', 'float32' or 'bfloat16'"),
        ("QUANTIZATION", "int3", "'auto', 'none', 'int8' or 'fp8'"),
        ("KERNELS", "magic", "'auto', 'xla' or 'native'"),
        ("LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
        ("ALIASES", "gpt", "alias=model"),
        ("MAX_BODY_BYTES", "1", "at least 1024"),
        ("CONFIG", "/nowhere.toml", "cannot be read"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(f"INFERNEO_{name}", value)
    with pytest.raises(ConfigError, match=f"^INFERNEO_{name} .*{re.escape(words)}"):
        Settings.load()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("slots = 'x'", "'slots' in .*inferneo.toml is 'x'"),
        ("slot = 1", "'slot' in .*inferneo.toml is not a setting; did you mean 'slots'"),
        ("slots = ", "no TOML"),
    ],
)
def test_a_wrong_file_is_named(file: Path, text: str, words: str) -> None:
    file.write_text(text)
    with pytest.raises(ConfigError, match=words):
        Settings.load()


def test_a_variable_that_is_no_setting_is_pointed_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_MODLES", "a")
    (sentence,) = unknown_variables()
    assert "INFERNEO_MODLES" in sentence
    assert "did you mean INFERNEO_MODELS" in sentence


def test_flags_win_over_variables(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    file.write_text("slots = 3\nmax_len = 50\nport = 1\n")
    monkeypatch.setenv("INFERNEO_SLOTS", "4")
    monkeypatch.setenv("INFERNEO_PORT", "2")
    settings = Settings.load({"port": "3", "models": ("a",)})
    assert (settings.port, settings.slots, settings.max_len) == (3, 4, 50)
    names = [settings.named(name) for name in ("port", "models", "slots", "dtype")]
    assert names == ["--port", "MODEL", "INFERNEO_SLOTS", "INFERNEO_DTYPE"]
    assert settings.named("max_len") == f"'max_len' in {file}"


def test_a_flag_names_the_file(monkeypatch: pytest.MonkeyPatch, file: Path, tmp_path: Path) -> None:
    file.write_text("slots = 3\n")
    other = tmp_path / "other.toml"
    other.write_text("slots = 4\n")
    assert Settings.load({"config": str(other)}).slots == 4
    other.write_text("slots = 0\n")
    with pytest.raises(ConfigError, match=r"^'slots' in .*other\.toml is 0"):
        Settings.load({"config": str(other)})
    with pytest.raises(ConfigError, match=r"^--config names /nowhere, which cannot be read"):
        Settings.load({"config": "/nowhere"})
    other.write_text(f"config = '{file}'\n")
    with pytest.raises(ConfigError, match="there can be one only"):
        Settings.load({"config": str(other)})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"slots": "0"}, "--slots is '0'; it must be at least 1"),
        ({"max_len": "x"}, "--max-len is 'x'; it must be an integer"),
        ({"port": "65536"}, "--port is '65536'; it must be at most 65535"),
        ({"dtype": "int4"}, "--dtype is 'int4'; it must be 'auto', 'float32' or 'bfloat16'"),
        ({"aliases": "x"}, "--aliases holds 'x'; write alias=model"),
        ({"process_id": "1"}, "INFERNEO_NUM_PROCESSES and --process-id need INFERNEO_COORD"),
    ],
)
def test_a_wrong_flag_is_named(flags: dict, words: str) -> None:
    with pytest.raises(ConfigError, match="^" + re.escape(words)):
        Settings.load(flags)


def test_every_setting_is_described() -> None:
    found = list(setting_docs(ReplicaSettings))
    assert [each.name for each in found] == list(ReplicaSettings.model_fields)
    assert [each.name for each in found if not (each.flag or each.group == "Replicas")] == [
        "models",
        "job_token",
        "prefill_token",
    ]
    for each in found:
        assert each.description.endswith("."), each
        assert each.about.endswith("."), each
        assert "None" not in each.default, each
        assert each.form != "TEXT", each
    slots = next(each for each in found if each.name == "slots")
    assert (slots.variable, slots.flag) == ("INFERNEO_SLOTS", "--slots")
    assert (slots.form, slots.bounds) == ("N", "1 to 256")
    assert slots.default == "256 on accelerators, 32 on CPUs"


def test_as_many_may_wait_beside_the_slots_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    for platform, slots in (("tpu", 256), ("cpu", 32)):
        monkeypatch.setattr(
            "server.config.settings.expected_platform", lambda found=platform: found
        )
        assert Settings.load({"max_waiting": "10"}).capacity() == slots + 10
    assert Settings.load({"max_waiting": "10", "slots": "3"}).capacity() == 13


def test_what_kubernetes_says_of_a_service_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INFERNEO_PORT", "tcp://10.0.0.1:8000")
    with pytest.raises(ConfigError, match=r"^INFERNEO_PORT is 'tcp"):
        Settings.load()
    monkeypatch.setenv("INFERNEO_SERVICE_HOST", "10.0.0.1")
    assert Settings.load().port == 8000
    (sentence,) = unknown_variables()
    assert sentence.startswith("INFERNEO_PORT, INFERNEO_SERVICE_HOST: made by Kubernetes")
    monkeypatch.setenv("INFERNEO_PORT", "9000")
    assert Settings.load().port == 9000


def test_the_default_is_a_chat_and_an_embedding_model() -> None:
    assert [source.id for source in sources_of(Settings())] == [
        "smollm2-135m-instruct",
        "all-minilm-l6-v2",
    ]


def test_a_folder_is_a_model_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (source,) = sources_of(Settings(models=(str(tmp_path / "mine"),)))
    assert (source.id, source.path) == ("mine", tmp_path / "mine")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"models": ("a", "a")}, "two models"),
        ({"models": ("/nowhere/at/all",)}, "no file or folder"),
        ({"models": ("a",), "aliases": {"x": "b"}}, "not among the models"),
        ({"models": ("a", "b"), "aliases": {"a": "b"}}, "the id of a model already"),
    ],
)
def test_names_that_do_not_go_together_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sources_of(Settings(**settings))


JOB = {"coordinator": "host:8476", "num_processes": 2, "process_id": 1, "job_token": 32 * "x"}


def test_a_job_is_named_whole_or_found_by_jax() -> None:
    assert Settings().job_config() is None
    job = Settings(**JOB).job_config()
    assert job
    assert (job.coordinator, job.num_processes, job.process_id) == ("host:8476", 2, 1)
    found = Settings(coordinator="auto", job_token=32 * "x").job_config()
    assert found
    assert (found.coordinator, found.num_processes, found.process_id) == (None, None, None)
    assert 32 * "x" not in repr(Settings(**JOB))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job_token": None}, "needs INFERNEO_JOB_TOKEN"),
        ({"job_token": "secret"}, "at least 16 characters"),
        ({"process_id": None}, "needs num_processes and process_id"),
        ({"process_id": 2}, "process_id is 2 and num_processes 2"),
        ({"coordinator": "host"}, "write it as host:port"),
        ({"coordinator": None}, "need INFERNEO_COORDINATOR, as host:port"),
        ({"coordinator": "auto"}, "need INFERNEO_COORDINATOR, as host:port"),
    ],
)
def test_half_a_job_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        Settings(**(JOB | changes)).job_config()
    assert "secret'" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill_token": None}, "INFERNEO_PREFILL_LISTEN needs INFERNEO_PREFILL_TOKEN"),
        ({"prefill_token": "secret"}, "at least 16 characters"),
        ({"prefill_listen": "host"}, "'host'; write it as host:port"),
        ({"prefill_servers": "a:1,b"}, "either computes prompts for others or has others"),
        ({"prefill_listen": None, "prefill_servers": "a:1,b"}, "'b'; write it as host:port"),
        ({"engine_process": "true"}, "set INFERNEO_ENGINE_PROCESS to false"),
    ],
)
def test_prompts_that_nobody_could_hand_over_are_refused(changes: dict, words: str) -> None:
    given = {"prefill_listen": "0.0.0.0:8100", "prefill_token": 32 * "x"}
    assert Settings(**given).handover_config()
    with pytest.raises(ConfigError, match=words) as caught:
        Settings(**(given | changes)).handover_config()
    assert "secret'" not in str(caught.value)


@pytest.mark.parametrize("store", [None, "/data/keys.db", "unix:///run/redis.sock"])
def test_several_replicas_need_a_store_that_all_reach(
    store: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INFERNEO_REPLICAS", "2")
    if store is not None:
        monkeypatch.setenv("INFERNEO_KEYS_DB", store)
    with pytest.raises(ConfigError, match="INFERNEO_REPLICAS is 2, and INFERNEO_KEYS_DB is no URL"):
        ReplicaSettings.load()


def test_replicas_get_the_servers_settings_and_ask_for_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("INFERNEO_CHECKPOINTS")
    given = {"INFERNEO_KEYS_DB": "redis://host/0", "INFERNEO_SLOTS": "4"}
    for name, value in (given | {"INFERNEO_REPLICAS": "2", "INFERNEO_REPLICA_TPUS": "4"}).items():
        monkeypatch.setenv(name, value)
    settings = ReplicaSettings.load()
    assert settings.environment() == given | {"INFERNEO_REQUIRE_KEY": "true"}
