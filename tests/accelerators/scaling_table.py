"""Plan the models of docs/scaling.md for TPUs and GPUs, and print their table; nothing is run.

A plan takes one to five minutes on two cores, so each is kept in a folder and not made again:

    pip install -e '.[plan]'
    python tests/accelerators/scaling_table.py /tmp/plans
    python tests/accelerators/scaling_table.py /tmp/plans --markdown

``--only 70B int8`` chooses plans whose commands hold these words, ``--gpus`` those for H100s, in
an environment of its own (``.[plan-cuda]``).
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

MODELS = {
    "meta-llama/Llama-2-7b-hf": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "meta-llama/Llama-3.1-8B": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "meta-llama/Llama-3.1-70B": ("v5e:2x4", "v5e:4x8", "v6e:2x4", "v5p:2x2x1"),
}
GPUS = {
    "meta-llama/Llama-2-7b-hf": ("h100:1",),
    "meta-llama/Llama-3.1-8B": ("h100:1", "h100:8"),
    "meta-llama/Llama-3.1-70B": ("h100:8",),
}
MESHES = {"v5e:4x8": "data=2,model=16"}
"""Where the default, all chips on ``model``, is not the best: eight KV heads over 32 chips."""
LEN = "4096"
QUANTIZATIONS: dict[str, list[str]] = {
    "bf16": [],
    "int8": ["--quantization", "int8", "--kv-dtype", "int8"],
}
HEADS = (
    "model", "chips, data x model", "numbers", "weights GB", "programs GB", "KV GB", "requests",
    "in place", "temporaries", "decode: collectives", "traffic / needed", "decode ms", "wall",
    "tokens/s", "a chip", "programs", "compiled in",
)  # fmt: skip
_SMALL = 100_000
"""Collectives of fewer bytes are of what is sampled: a few numbers of each row."""


def commands(models: dict[str, tuple[str, ...]]) -> list[list[str]]:
    """The arguments of every plan."""
    return [
        [
            *(model, "--topology", topology, "--max-len", LEN),
            *(("--mesh", MESHES[topology]) if topology in MESHES else ()),
            *extra,
        ]
        for model, topologies in models.items()
        for topology in topologies
        for extra in QUANTIZATIONS.values()
    ]


def kept(arguments: list[str], folder: Path) -> Path:
    """Where a plan is kept."""
    return folder / ("_".join(arguments).replace("/", "-").replace("--", "") + ".json")


def make(arguments: list[str], folder: Path) -> None:
    """Make a plan, unless it is kept."""
    file = kept(arguments, folder)
    if file.exists():
        return
    print(*arguments, end=" ", flush=True)
    began = time.monotonic()
    command = [sys.executable, "-m", "server.cli", "plan", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
    if not done.stdout:
        raise SystemExit(f"failed: {done.stderr[-2000:]}")
    file.write_text(done.stdout)
    print(f"{time.monotonic() - began:.0f} s", flush=True)


def row(made: dict[str, Any]) -> list[str]:
    """A line of the table."""
    mesh = made["mesh"]
    first = [
        made["model"].split("/")[1].removesuffix("-hf"),
        f"{made['topology']}, {mesh['data']} x {mesh['model']}",
        "int8" if made["quantization"] == "int8" else "bf16",
        f"{made['weight_bytes'] / 1e9:.2f}",
    ]
    if made["missing_bytes"]:
        short = f"short by {made['missing_bytes'] / 1e9:.1f} GB: {' or '.join(made['remedies'])}"
        return [*first, short, *[""] * (len(HEADS) - len(first) - 1)]
    decode, mixed = made["steps"]
    collectives = ", ".join(
        f"{c['count']} {c['kind']} of {c['num_bytes'] / 1e3:,.0f} kB"
        for c in decode["collectives"]
        if c["num_bytes"] >= _SMALL
    )
    temporary = max(step["temporary_bytes"] for step in (decode, mixed))
    share = 100 * temporary / decode["cache_bytes"]
    in_place = all(s["aliased_bytes"] >= s["cache_bytes"] for s in (decode, mixed))
    traffic = decode["moved_bytes"]
    return [
        *first,
        f"{(made['temporary_bytes'] + made['code_bytes']) / 1e9:.2f}",
        f"{made['kv_bytes'] / 1e9:.2f}",
        str(made["rows"]),
        "yes" if in_place else "NO",
        f"{temporary / 1e6:.0f} MB, {share:.1f} %",
        collectives or "none",
        f"{traffic / decode['needed_bytes']:.3f}" if traffic else "",
        f"{1e3 * decode['seconds']:.2f}",
        decode["wall"],
        f"{made['tokens_per_second']:,.0f}",
        f"{made['tokens_per_second'] / (mesh['data'] * mesh['model']):,.0f}",
        str(made["num_programs"]),
        f"{made['compile_seconds']:,.0f} s",
    ]


def main() -> None:
    """Make the plans, or print the table of those that are kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="where plans are kept")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="that a plan has")
    parser.add_argument("--gpus", action="store_true", help="for H100s")
    parser.add_argument("--markdown", action="store_true", help="print the table, make nothing")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        arguments
        for arguments in commands(GPUS if chosen.gpus else MODELS)
        if all(word in " ".join(arguments) for word in chosen.only)
    ]
    if not chosen.markdown:
        for arguments in wanted:
            make(arguments, chosen.folder)
        return
    print(f"| {' | '.join(HEADS)} |\n|{' - |' * len(HEADS)}")
    for file in (kept(arguments, chosen.folder) for arguments in wanted):
        if file.exists():
            print(f"| {' | '.join(row(json.loads(file.read_text())))} |")


if __name__ == "__main__":
    main()
