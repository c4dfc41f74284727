"""Plans: what they read off compiled programs, what they say, and the promises kept on a TPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec
from typer.testing import CliRunner

from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.errors import ConfigError
from inferneo_jax.planner.budget import Wish
from inferneo_jax.planner.chips import CHIPS, Topology
from inferneo_jax.planner.hlo import Program
from inferneo_jax.planner.known import KNOWN
from inferneo_jax.planner.planner import make_plan
from inferneo_jax.runner.capacity import cache_budget
from inferneo_jax.sharding.mesh import make_mesh
from server.cli.main import app
from tests.support.model_files import llama_config
from tests.support.paths import ROOT
from tests.support.tiny_model import TINY


def _cli(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "server.cli", "plan", *arguments, "--json"]
    environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=560, cwd=ROOT, env=environment
    )
    assert done.stdout, done.stderr
    return dict(json.loads(done.stdout))


def _config(folder: Path, model: DecoderConfig, **changes: Any) -> Path:
    """The config.json of a model of these sizes."""
    file = folder / "config.json"
    file.write_text(json.dumps(llama_config(model) | changes))
    return file


def _wish(**changes: Any) -> Wish:
    engine = EngineConfig(
        slots=8,
        page_len=4,
        prefill_chunks=(8,),
        max_len=32,
        row_buckets=(8,),
        dtype="float32",
    )
    values = {"model": TINY, "topology": Topology.parse("cpu:8"), "engine": engine, "context": 16}
    return Wish(**(values | changes))


def test_a_plan_counts_two_reductions_a_layer_and_one_for_the_lookup() -> None:
    plan = make_plan(_wish())
    decode = plan.steps[0]
    counted = {each.kind: 0 for each in decode.collectives}
    for each in decode.collectives:
        counted[each.kind] += each.count
        assert each.participants == 8
    assert counted == {"all-reduce": 2 * TINY.num_layers + 1, "all-gather": 1}
    assert decode.aliased_bytes >= decode.cache_bytes
    assert (plan.slots, plan.rows, plan.row_buckets) == (8, 8, (8,))
    assert plan.prefill_shapes == ((1, 8),)
    # Four that sample, and one each that decodes, prefills, does both, admits, applies grammars,
    # scores what was sampled, scores prompts and makes the cache.
    assert plan.num_programs == 12
    assert plan.compile_seconds > 0.1
    assert (plan.mesh, plan.missing_bytes, plan.dtype) == (MeshShape(1, 8), 0, "float32")
    assert plan.kv_bytes == cache_budget("cpu", total=plan.memory_bytes, free=0)
    assert plan.kv_tokens > 10**6
    programs = plan.state_bytes + plan.temporary_bytes + plan.code_bytes
    assert plan.weight_bytes + programs + plan.kv_bytes < plan.memory_bytes


def test_a_draft_model_takes_memory_and_leaves_the_steps_as_they_are() -> None:
    alone, both = make_plan(_wish()), make_plan(_wish(draft=TINY))
    assert both.weight_bytes == 2 * alone.weight_bytes
    assert both.kv_tokens < 0.6 * alone.kv_tokens
    assert both.steps == alone.steps


def test_groups_cross_only_with_what_they_sampled() -> None:
    engine = EngineConfig(
        slots=8,
        page_len=4,
        prefill_chunks=(8,),
        max_len=32,
        row_buckets=(8,),
        mesh=MeshShape(8, 1),
    )
    wish = _wish(engine=engine)
    decode = make_plan(wish).steps[0]
    assert {each.kind for each in decode.collectives} == {"all-gather"}
    assert all(each.num_bytes <= 8 * 8 * 20 * 4 for each in decode.collectives)


def test_traffic_is_what_an_operation_reads_and_writes() -> None:
    x = jax.ShapeDtypeStruct((128, 256), jnp.float32)
    compiled = jax.jit(lambda x: jnp.sin(x) + 1).lower(x).compile()
    program = Program(compiled.as_text())
    assert program.traffic(()) == 2 * 128 * 256 * 4
    assert program.traffic([(128, 256)]) == 0
    assert program.collectives() == []


def test_kernels_are_believed_and_copies_of_whole_arrays_are_counted() -> None:
    program = Program(
        """
ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %p = f32[8,4]{1,0} parameter(0)
  %k = f32[8,4]{1,0} custom-call(%p), backend_config={"cost_estimate":{"bytes_accessed":"96"}}
  %f = f32[8,4]{1,0} custom-call(%k), custom_call_target="tpu_custom_call"
  ROOT %c = f32[8,4]{1,0} copy(%f)
}
"""
    )
    assert program.traffic([(8, 4)]) == 96 + 2 * 8 * 4 * 4
    assert program.traffic([]) == 96 + 2 * 2 * 8 * 4 * 4


def test_collectives_are_found_with_what_they_send() -> None:
    mesh = make_mesh(MeshShape(2, 4))
    step = jax.shard_map(
        lambda x: jax.lax.psum(x, "model"),
        mesh=mesh,
        in_specs=PartitionSpec("data", "model"),
        out_specs=PartitionSpec("data"),
    )
    x = jax.ShapeDtypeStruct((8, 1024), jnp.float32)
    found = Program(jax.jit(step).lower(x).compile().as_text()).collectives()
    assert [(c.kind, c.num_bytes, c.participants, c.count) for c in found] == [
        ("all-reduce", 4 * 256 * 4, 4, 1)
    ]
    assert found[0].sent_bytes == 2 * 3 / 4 * 4 * 256 * 4


@pytest.mark.parametrize(
    ("groups", "participants"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("[2,4]<=[8]", 4),
        ("mesh['data'=2,'model'=4] {'model'}", 4),
        ("mesh['data'=2,'model'=4], device_ids=([4,2]T(1,0)) {'data','model'}", 8),
        ("mesh['data'=2,'model'=4] {'data','model':(2)2}", 4),
    ],
)
def test_groups_of_a_collective_are_read_in_every_form(groups: str, participants: int) -> None:
    operation = f"all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add"
    program = Program(f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %r = f32[8]{{0}} {operation}\n}}")
    assert [each.participants for each in program.collectives()] == [participants]


@pytest.mark.parametrize("text", ["v5e", "v5e:", "v9:2x2", "v5e:2x", "v5e:0x2", "v5e:2x2x2x2"])
def test_what_is_no_topology_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write chip:shape, as v5e:2x4"):
        Topology.parse(text)


def test_a_topology_grows_along_its_shortest_axis() -> None:
    assert str(Topology.parse("v5e:2x4").larger()) == "v5e:4x4"
    assert str(Topology.parse("h100:8").larger()) == "h100:16"
    assert Topology.parse("v5p:2x2x1").num_chips == 4
    assert set(CHIPS) == {"v5e", "v6e", "v5p", "h100", "cpu"}


def test_what_does_not_fit_says_by_how_much_and_what_would_help() -> None:
    plan = make_plan(
        _wish(model=KNOWN["meta-llama/Llama-2-70b-hf"], topology=Topology.parse("cpu:2"))
    )
    assert plan.missing_bytes > 100e9
    assert plan.steps == ()
    assert plan.remedies == ()  # jax here has 8 CPU devices, on which it would not fit either
    seven = make_plan(
        _wish(model=KNOWN["meta-llama/Llama-2-7b-hf"], topology=Topology.parse("cpu:1"))
    )
    assert seven.missing_bytes > seven.weight_bytes - seven.memory_bytes > 9e9
    assert "topology cpu:2" in seven.remedies


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_known_models_have_the_size_that_their_names_say(name: str) -> None:
    model = KNOWN[name]
    found = re.search(r"-([\d.]+)([bBM])", name)
    assert found
    said = float(found[1]) * (1e6 if found[2] == "M" else 1e9)
    attention = model.hidden_size * model.head_dim * (2 * model.num_heads + 2 * model.num_kv_heads)
    layers = model.num_layers * (attention + 3 * model.hidden_size * model.mlp_size)
    tables = model.vocab_size * model.hidden_size * (1 if model.tie_embeddings else 2)
    assert 0.85 * said < layers + tables < 1.3 * said


def test_the_command_prints_memory_and_a_bound(tmp_path: Path) -> None:
    config = _config(tmp_path, TINY)
    arguments = ["plan", str(config), "--topology", "cpu:2", "--slots", "2", "--max-len", "64"]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120", "JAX_PLATFORMS": "cpu"})
    assert done.exit_code == 0, done.output
    for words in (
        "one chip, 17.18 GB",
        " programs: about ",
        "weights",
        "KV cache:",
        "5 x all-reduce",
        "output tokens/s",
    ):
        assert words in done.output


def test_an_unknown_model_is_answered_with_those_that_are_known() -> None:
    done = CliRunner().invoke(app, ["plan", "org/nothing", "--topology", "cpu:1"])
    assert isinstance(done.exception, ConfigError)
    assert "meta-llama/Llama-3.1-8B" in str(done.exception)


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="libtpu is not installed")
def test_llama_2_7b_keeps_its_promises_on_a_v5e(tmp_path: Path) -> None:
    """The cache in place, two reductions a layer, and no memory traffic beyond weights and KV.

    Six layers show it as 32 do, each compiled like the others; PLAN_7B=1 takes all of them.
    """
    layers = 32 if os.environ.get("PLAN_7B") else 6
    config = _config(tmp_path, KNOWN["meta-llama/Llama-2-7b-hf"], num_hidden_layers=layers)
    plan = _cli(str(config), "--topology", "v5e:2x4", "--max-len", "4096")
    assert plan["missing_bytes"] == 0
    assert (plan["slots"], plan["rows"]) == (256, 256)
    assert max(rows * tokens for rows, tokens in plan["prefill_shapes"]) == 2048
    assert [(step["kind"], step["tokens"]) for step in plan["steps"]] == [
        ("decode", 256),
        ("mixed", 256 + 2048),
    ]
    for step in plan["steps"]:
        assert step["aliased_bytes"] >= step["cache_bytes"]
        assert step["temporary_bytes"] < 0.05 * step["cache_bytes"]
        reduced = [c for c in step["collectives"] if c["kind"] == "all-reduce"]
        gathered = [c for c in step["collectives"] if c["kind"] != "all-reduce"]
        in_layers = max(reduced, key=lambda c: c["count"])
        assert in_layers["count"] == 2 * layers + 1
        # Of each row that is sampled, every chip tells its best token and that token's logit.
        rest = [c for c in reduced if c is not in_layers] + gathered
        assert [c["count"] * c["num_bytes"] for c in rest] == [8 * 8 * 256]
    decode = plan["steps"][0]
    assert decode["moved_bytes"] <= 1.1 * decode["needed_bytes"]
