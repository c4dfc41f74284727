import os
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from inferneo_jax import InferneoError, __version__
from inferneo_jax.weights.catalog import load_catalog
from inferneo_jax.weights.checkpoint import read_info
from server.cli.main import app, main
from server.cli.progress import TimeLeft
from server.observe import log
from tests.support.fake_hub import hub

__all__ = ["hub"]


@pytest.fixture
def inferneo(tmp_path):
    store = tmp_path / "store"

    def run(*arguments):
        environment = {
            "INFERNEO_CHECKPOINTS": str(store),
            "INFERNEO_KEYS_DB": str(tmp_path / "keys.db"),
            "INFERNEO_PORT": "0",
            "COLUMNS": "200",
        }
        return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)

    run.store = store
    yield run
    log.configure("json")  # or the log would be written where the runner kept the output


def test_a_converted_model_is_listed_shown_and_removed(made, inferneo, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    done = inferneo("convert", folder, "--name", "org/tiny")
    assert done.exit_code == 0, done.output
    assert read_info(inferneo.store / "org/tiny").family == "llama"
    listed = inferneo("list").output
    assert re.search(r"org/tiny +chat +safetensors +0M +0 MB +ready", listed)
    (command,) = re.findall(r"inferneo pull (.*)", listed)
    assert command.split() == list(load_catalog())
    shown = inferneo("show", "org/tiny").output
    assert "llama (decoder)" in shown
    (inferneo.store / "org/tiny/inferneo.json").write_text("{}")
    assert "damaged" in inferneo("list").output
    assert inferneo("rm", "org/tiny").exit_code == 0
    assert list(inferneo.store.iterdir()) == []


def test_converting_needs_no_device(made, tmp_path):
    """It must not take an accelerator from a running server."""
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    done = subprocess.run(
        [sys.executable, "-m", "server.cli", "convert", folder, "--checkpoints", tmp_path / "c"],
        env={**os.environ, "JAX_PLATFORMS": "none-at-all"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert read_info(tmp_path / "c" / "hf").family == "llama"


def test_an_interrupted_pull_is_listed_and_can_be_removed(inferneo):
    begun = inferneo.store / "org" / ".g:Q4_K_M.download"
    begun.mkdir(parents=True)
    (begun / "0.partial").write_bytes(bytes(12_000_000))
    listed = inferneo("list").output
    assert re.search("org/g:Q4_K_M +12 MB +pull begun", listed)
    assert inferneo("rm", "org/g:Q4_K_M").exit_code == 0
    assert list(inferneo.store.iterdir()) == []


def test_licence_size_and_choice_are_shown_before_a_pull(made, inferneo, hub, tmp_path):
    file = made.gguf(tmp_path / "tiny.gguf", made.LLAMA, made.tensors(made.LLAMA))
    content = file.read_bytes()
    hub.add("org/g", {"m-Q2_K.gguf": content, "m-Q8_0.gguf": content + bytes(1000)})
    done = inferneo("pull", "org/g")
    assert done.stdout == f"org/g: {inferneo.store / 'org/g'}\n"
    first, second, third = done.stderr.splitlines()
    assert first == "org/g: m-Q8_0.gguf, 0 MB, licence: apache-2.0"
    assert second == "  from org/g on the Hugging Face Hub"
    assert third.startswith("  the largest of 2 up to Q8_0; fits into the ")
    assert third.endswith("; others are Q2_K")


def test_the_time_left_is_told_from_the_speed_of_this_attempt(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    left, mega = TimeLeft(), 1_000_000
    assert left.after("downloading", 400 * mega, 1000 * mega) == ""
    now = 10.0
    assert left.after("downloading", 410 * mega, 1000 * mega) == "10 min left"
    now = 20.0
    assert left.after("downloading", 900 * mega, 1000 * mega) == "4 s left"
    assert left.after("writing", 0, 0) == ""


def test_the_name_is_that_of_the_path_unless_given(made, inferneo, tmp_path):
    file = made.gguf(tmp_path / "tiny.Q8.gguf", made.LLAMA, made.tensors(made.LLAMA))
    assert inferneo("convert", file).exit_code == 0
    assert read_info(inferneo.store / "tiny.Q8").kind == "decoder"


def test_a_known_failure_is_one_message_and_status_one(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        "sys.argv", ["inferneo", "show", "no[thing]", "--checkpoints", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as raised:
        main()
    assert raised.value.code == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "no[thing]" in printed.err
    assert "Traceback" not in printed.err


def test_the_version_is_that_of_the_package(inferneo):
    assert inferneo("--version").output == f"inferneo {__version__}\n"


def test_help_names_every_command_in_its_group(inferneo):
    shown = inferneo("--help").output
    places = [shown.index(f"─ {group} ─") for group in ("Serve", "Models", "Plan and measure")]
    assert places == sorted(places)
    for command in (
        "serve",
        "doctor",
        "keys",
        "follow",
        "pull",
        "convert",
        "compile",
        "plan",
        "bench",
    ):
        assert f"│ {command} " in shown


def test_a_folder_of_the_settings_file_counts_here_too(inferneo, made, tmp_path, monkeypatch):
    made.folder(tmp_path / "hf", made.LLAMA)
    (tmp_path / "inferneo.toml").write_text(f"checkpoints = '{tmp_path / 'other'}'\n")
    monkeypatch.setenv("INFERNEO_CONFIG", str(tmp_path / "inferneo.toml"))
    settings = {"INFERNEO_CHECKPOINTS": None, "COLUMNS": "200"}
    arguments = ["convert", str(tmp_path / "hf"), "--name", "tiny"]
    assert CliRunner().invoke(app, arguments, env=settings).exit_code == 0
    assert read_info(tmp_path / "other" / "tiny").family == "llama"
    assert inferneo("list", "--checkpoints", tmp_path / "other").output.count("tiny") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("show", "nosuch"), "no model 'nosuch' in .*; there are: none"),
        (("rm", "nosuch"), "no model 'nosuch' in .*; there are: none"),
        (("pull", "nosuch"), "no model 'nosuch' in the catalog; there are smollm2-135m-instruct"),
        (("pull", "a/b/c"), "'a/b/c' cannot name a repository of the Hugging Face Hub"),
        (("pull", "../x"), "'../x' cannot name a model"),
        (("convert", "/nowhere"), "there is no file or folder /nowhere"),
        (("serve", "--host", "192.0.2.1"), "--host is '192.0.2.1', no address of this machine"),
        (("serve", "--host", "no.such.invalid"), "--host is 'no.such.invalid', no address of"),
        (("serve", "--slots", "0"), r"--slots is '0'; it must be at least 1\."),
        (("serve", "--config", "/nowhere"), "--config names /nowhere, which cannot be read"),
        (("serve", "a", "a"), "MODEL names two models that would be called 'a'"),
        (("serve", "./nowhere"), r"MODEL names \./nowhere, where there is no file or folder"),
        (("serve", "--keys-db", "mysql://x"), "--keys-db begins with mysql://"),
    ],
)
def test_what_a_new_user_gets_wrong_is_a_sentence(inferneo, arguments, words):
    done = inferneo(*arguments)
    assert isinstance(done.exception, InferneoError)
    assert re.search(words, str(done.exception))
    assert done.output == ""


def test_a_folder_that_cannot_be_made_is_told_with_what_to_do(made, tmp_path):
    (tmp_path / "file").touch()
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    arguments = ["convert", str(folder), "--checkpoints", str(tmp_path / "file" / "below")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, InferneoError)
    assert "name another folder with --checkpoints" in str(done.exception)
