import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from inferneo_jax.config import DecoderConfig
from inferneo_jax.errors import CheckpointError, WeightsError
from inferneo_jax.platform.atomic import new_folder, remove_folder, scratch_folder
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.orbax import open_arrays
from tests.support.weights import write_arrays_checkpoint

CONFIG = DecoderConfig(
    vocab_size=8,
    hidden_size=4,
    mlp_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=2,
    context_length=16,
)
WEIGHTS = {
    "embed.table": np.arange(32, dtype=np.float32).reshape(8, 4),
    "layers.0.attention_norm.scale": np.ones(4, np.float32),
}


def write(path, weights=WEIGHTS):
    return write_arrays_checkpoint(
        path,
        CONFIG,
        weights,
        eos_token_ids=(7, 2),
        bos_token_id=1,
        licence="mit",
        source={"from": "here"},
    )


SHAPES = {name: array.shape for name, array in WEIGHTS.items()}


def test_what_is_written_is_read_back(tmp_path):
    path = write(tmp_path / "org" / "model")
    info = read_info(path)
    assert (info.kind, info.family, info.config, info.licence) == (
        "decoder",
        "llama",
        CONFIG,
        "mit",
    )
    assert (info.eos_token_ids, info.bos_token_id, info.source) == ((2, 7), 1, {"from": "here"})
    for name, weight in open_arrays(path / "weights", SHAPES).items():
        np.testing.assert_array_equal(weight[...], WEIGHTS[name])
        np.testing.assert_array_equal(weight[1:3], WEIGHTS[name][1:3])
    assert [p.name for p in path.parent.iterdir()] == ["model"]


def test_large_weights_are_stored_in_pieces(tmp_path):
    large = {"embed.table": np.zeros((4096, 2048), np.float32)}
    path = write(tmp_path / "m", large)
    description = next((path / "weights").rglob("manifest.ocdbt"))
    assert description.exists()
    weight = open_arrays(path / "weights", {"embed.table": (4096, 2048)})["embed.table"]
    assert np.prod(weight._array.chunk_layout.read_chunk.shape) * 4 <= 2**24


def test_orbax_reads_what_is_written(tmp_path):
    import orbax.checkpoint

    rng = np.random.default_rng(0)
    weights = {
        "layers.0.kernel": rng.normal(size=(3, 2, 4)).astype(ml_dtypes.bfloat16),
        "table": rng.normal(size=(5, 4)).astype(np.float16),
        "blocks": rng.integers(0, 256, (7, 18), np.uint8),
        **WEIGHTS,
    }
    path = write(tmp_path / "m", weights)
    found = orbax.checkpoint.PyTreeCheckpointer().restore(path / "weights")
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_flipped_byte_is_noticed_when_it_is_read(tmp_path):
    rng = np.random.default_rng(0)
    weights = {"embed.table": rng.normal(size=(512, 64)).astype(np.float32)}
    path = write(tmp_path / "m", weights)
    files = [f for f in (path / "weights").rglob("*") if f.is_file() and f.parent.name == "d"]
    largest = max(files, key=lambda file: file.stat().st_size)
    content = largest.read_bytes()
    place = content.index(weights["embed.table"][100].tobytes())
    largest.write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
    with pytest.raises(CheckpointError, match=r"cannot be read.*inferneo rm"):
        open_arrays(path / "weights", {"embed.table": (512, 64)})["embed.table"][:]


def test_names_and_shapes_are_compared_before_anything_is_read(tmp_path):
    path = write(tmp_path / "m")
    many = {f"gone.{i:02}": (1,) for i in range(12)}
    wanted = {"embed.table": (8, 5)} | many
    with pytest.raises(WeightsError) as raised:
        open_arrays(path / "weights", wanted)
    text = str(raised.value)
    assert "12 missing (gone.00, " in text
    assert "gone.09, ...)" in text
    assert "gone.10" not in text
    assert "1 unused (layers.0.attention_norm.scale)" in text
    assert "1 misshapen (embed.table is [8, 4], not [8, 5])" in text


def test_damaged_weights_are_a_checkpoint_error(tmp_path):
    large = {"embed.table": np.ones((512, 512), np.float32)}
    path = write(tmp_path / "m", large)
    wanted = {"embed.table": (512, 512)}
    data = [f for f in (path / "weights").rglob("*") if f.is_file() and f.parent.name == "d"]
    largest = max(data, key=lambda file: file.stat().st_size)
    assert largest.stat().st_size >= 2**20
    os.truncate(largest, 2**19)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_arrays(path / "weights", wanted)["embed.table"][:]
    for file in data:
        os.truncate(file, 0)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_arrays(path / "weights", wanted)["embed.table"][:]
    for file in (path / "weights").iterdir():
        if file.is_file():
            file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_arrays(path / "weights", wanted)["embed.table"][:]


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"kind": "vision"},
        {"config": {"vocab_size": 1}},
        {"config": None},
        {"created": "yesterday"},
        {"eos_token_ids": None},
    ],
    ids=str,
)
def test_a_description_of_another_form_is_refused(tmp_path, change):
    path = write(tmp_path / "m")
    values = json.loads((path / "inferneo.json").read_text())
    (path / "inferneo.json").write_text(json.dumps(values | change))
    with pytest.raises(CheckpointError, match="convert the model again"):
        read_info(path)


def test_a_folder_without_a_whole_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="inferneo pull"):
        read_info(tmp_path / "nothing")
    path = write(tmp_path / "m")
    (path / "weights").rename(path / "elsewhere")
    with pytest.raises(CheckpointError, match="no weights folder"):
        read_info(path)
    (path / "inferneo.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_info(path)


def test_an_existing_name_is_never_overwritten(tmp_path):
    path = write(tmp_path / "m")
    before = (path / "inferneo.json").read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        write(path)
    assert (path / "inferneo.json").read_bytes() == before


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def interrupted():
        with new_folder(tmp_path / "m") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_at_the_name_and_is_swept(tmp_path):
    child = kill_while_writing(tmp_path / "m")
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "m").exists()
    assert any(tmp_path.iterdir())
    write(tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["other"]
    kill_while_writing(tmp_path / "m")
    write(tmp_path / "m")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "other"]


def kill_while_writing(path):
    script = (
        "import sys, pathlib\n"
        "from inferneo_jax.platform.atomic import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'file').write_text('half')\n"
        "    print('writing', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdout.readline() == "writing\n"
        # Someone else's live folder is left alone.
        with new_folder(path.parent / "meanwhile"):
            assert (path.parent / f".{path.name}.partial" / "file").exists()
        remove_folder(path.parent / "meanwhile")
        child.kill()
    return child


def test_only_one_at_a_time_has_a_scratch_folder(tmp_path):
    scratch = tmp_path / ".m.partial"
    waited = threading.Event()
    order = []

    def second():
        with scratch_folder(scratch, waited.set) as folder:
            order.append(("second", list(folder.iterdir())))

    thread = threading.Thread(target=second)
    with scratch_folder(scratch) as folder:
        (folder / "file").touch()
        thread.start()
        assert waited.wait(30)
        order.append(("first", [p.name for p in folder.iterdir()]))
    thread.join(30)
    assert order == [("first", ["file"]), ("second", [])]
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="could not be written"):
        write(Path(tmp_path / "file" / "m"))
