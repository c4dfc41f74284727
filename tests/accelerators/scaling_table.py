"""Plan the models of docs/scaling.md for TPUs and print their table; nothing is run.

Takes about an hour on two cores, so each plan is kept in a folder and not made again:

    pip install -e '.[plan]'
    python tests/accelerators/scaling_table.py /tmp/plans

Further arguments choose among the rows, by words that their commands hold: ``70B int8``.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

MODELS = {
    "meta-llama/Llama-2-7b-hf": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "meta-llama/Llama-3.1-8B": ("v5e:2x4", "v6e:2x4", "v5p:2x2x1"),
    "meta-llama/Llama-3.1-70B": ("v5e:4x8", "v6e:2x4", "v5p:2x2x1"),
}
MESHES = {"v5e:4x8": "data=2,model=16"}
"""Where the default, all chips on ``model``, is not the best: eight KV heads over 32 chips."""
LEN = "4096"
QUANTIZATIONS = {"bf16": [], "int8": ["--quantization", "int8", "--kv-dtype", "int8"]}
HEADS = (
    "model", "chips", "numbers", "weights GB", "KV GB", "KV tokens", "in place", "temporaries / KV",
    "collectives of decode", "traffic / needed", "decode ms", "wall", "tokens/s a chip",
)  # fmt: skip


def commands() -> list[list[str]]:
    """The arguments of every plan."""
    return [
        [
            model,
            "--topology",
            topology,
            "--mesh",
            MESHES.get(topology, ""),
            "--max-len",
            LEN,
            *extra,
        ]
        for model, topologies in MODELS.items()
        for topology in topologies
        for extra in QUANTIZATIONS.values()
    ]


def plan(arguments: list[str], folder: Path) -> dict[str, Any]:
    """A plan from the folder, or made and put there."""
    file = folder / ("_".join(arguments).replace("/", "-").replace("--", "") + ".json")
    if not file.exists():
        command = [sys.executable, "-m", "server.cli", "plan", *arguments, "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False)
        if not done.stdout:
            raise SystemExit(f"{arguments}: {done.stderr[-2000:]}")
        file.write_text(done.stdout)
    return dict(json.loads(file.read_text()))


def row(made: dict[str, Any]) -> list[str]:
    """A line of the table."""
    mesh = made["mesh"]
    name = made["model"].split("/")[1].removesuffix("-hf")
    chips = f"{made['topology']}, {mesh['data']} x {mesh['model']}"
    numbers = "int8" if made["quantization"] == "int8" else "bf16"
    weights = f"{made['weight_bytes'] / 1e9:.2f}"
    if made["missing_bytes"]:
        short = f"short by {made['missing_bytes'] / 1e9:.1f} GB: {' or '.join(made['remedies'])}"
        return [name, chips, numbers, weights, short, *[""] * 8]
    decode, prefill = made["steps"]
    collectives = ", ".join(
        f"{c['count']} {c['kind']} of {c['num_bytes'] / 1e3:,.0f} kB" for c in decode["collectives"]
    )
    temporary = max(s["temporary_bytes"] / s["cache_bytes"] for s in (decode, prefill))
    in_place = all(s["aliased_bytes"] >= s["cache_bytes"] for s in (decode, prefill))
    return [
        name,
        chips,
        numbers,
        weights,
        f"{made['kv_bytes'] / 1e9:.2f}",
        f"{made['kv_tokens']:,}",
        "yes" if in_place else "NO",
        f"{100 * temporary:.1f} %",
        collectives,
        f"{decode['moved_bytes'] / decode['needed_bytes']:.3f}",
        f"{1e3 * decode['seconds']:.2f}",
        decode["wall"],
        f"{made['tokens_per_second'] / (mesh['data'] * mesh['model']):,.0f}",
    ]


def main() -> None:
    """Print the table as Markdown."""
    folder, words = Path(sys.argv[1]), sys.argv[2:]
    folder.mkdir(parents=True, exist_ok=True)
    print(*("", *HEADS, ""), sep=" | ")
    print("|" + " - |" * len(HEADS))
    for arguments in commands():
        if all(word in " ".join(arguments) for word in words):
            print(*("", *row(plan(arguments, folder)), ""), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
