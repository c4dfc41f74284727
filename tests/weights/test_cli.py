import subprocess
import sys

import pytest
from typer.testing import CliRunner

from inferneo_jax.weights.checkpoint import read_info
from server.cli import app, main


@pytest.fixture
def inferneo(tmp_path):
    store = tmp_path / "store"

    def run(*arguments):
        environment = {"INFERNEO_CHECKPOINTS": str(store), "COLUMNS": "200"}
        return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)

    run.store = store
    return run


def test_a_converted_model_is_listed_shown_and_removed(made, inferneo, tmp_path):
    folder = made.folder(tmp_path / "hf", made.LLAMA)
    done = inferneo("convert", folder, "--name", "org/tiny")
    assert done.exit_code == 0, done.output
    assert read_info(inferneo.store / "org/tiny").family == "llama"
    listed = inferneo("list").output
    assert "org/tiny" in listed
    assert "inferneo pull smollm2-135m-instruct" in listed
    shown = inferneo("show", "org/tiny").output
    assert "llama (decoder)" in shown
    (inferneo.store / "org/tiny/inferneo.json").write_text("{}")
    assert "damaged" in inferneo("list").output
    assert inferneo("rm", "org/tiny").exit_code == 0
    assert list(inferneo.store.iterdir()) == []


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


def test_help_loads_no_jax():
    script = (
        "import sys, server.cli\n"
        "heavy = {'jax', 'numpy', 'transformers', 'tokenizers', 'orbax'} & sys.modules.keys()\n"
        "sys.exit(str(heavy) if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
