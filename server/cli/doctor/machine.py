"""Checks of the machine: Python and its packages, devices, memory, disk, the C++ compiler."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from server.cli.doctor.finding import Finding, State, existing, in_bytes

SURVEY_SECONDS = 30.0
"""Time limit for JAX to find its devices; a broken driver may never answer."""
DISTRIBUTION = "inferneo-jax"
_FREE_BYTES = 1e9
_UNPACKED = 2
"""Disk space that a pull takes at most, as a multiple of the model's size."""
_ACCELERATORS = {"gpu": ("an NVIDIA GPU", "cuda12"), "tpu": ("a TPU", "tpu")}
"""By platform, what to call it, and the extra that brings what JAX needs for it."""


@dataclass(frozen=True)
class Survey:
    """The output of ``inferneo_jax.runner.backends``.

    Attributes:
        facts: facts by part, as far as they were printed before a failure.
        failure: why it ended early; None if it did not.
    """

    facts: Mapping[str, Any]
    failure: str | None = None


def start_survey() -> subprocess.Popen[str]:
    """Start the survey of kernels and devices, which takes a second or more."""
    return subprocess.Popen(
        [sys.executable, "-m", "inferneo_jax.runner.backends"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # The survey must not take memory from a running server.
        env=os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )


def end_survey(process: subprocess.Popen[str], seconds: float = SURVEY_SECONDS) -> Survey:
    """Return the result of the survey, waiting at most ``seconds``."""
    failure = None
    try:
        printed, errors = process.communicate(timeout=seconds)
        if process.returncode:
            said = [line for line in errors.splitlines() if line.strip()]
            failure = said[-1] if said else f"it ended with exit code {process.returncode}"
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate()
        failure = f"no answer within {seconds:g} s"
    facts: dict[str, Any] = {}
    for line in printed.splitlines():
        if line.startswith("{"):
            facts |= json.loads(line)
    return Survey(facts, failure)


def packages(distribution: str = DISTRIBUTION) -> Iterator[Finding]:
    """Check the versions of packages against the bounds that this package declares."""
    version = ".".join(map(str, sys.version_info[:3]))
    try:
        requirements = [Requirement(text) for text in metadata.requires(distribution) or ()]
    except metadata.PackageNotFoundError:
        yield Finding(
            "Python",
            "warning",
            f"{version}; {distribution} is not installed, so no versions were compared",
            "pip install --editable .",
        )
        return
    wanted = [
        each for each in requirements if not each.marker or each.marker.evaluate({"extra": ""})
    ]
    wrong = {each: found for each in wanted if (found := wrong_version(each))}
    if wrong:
        bounds = " ".join(f"'{each.name}{each.specifier}'" for each in wrong)
        yield Finding("Python", "problem", "; ".join(wrong.values()), f"pip install {bounds}")
    else:
        yield Finding("Python", "ok", f"{version}, and {len(wanted)} packages within their bounds")


def wrong_version(requirement: Requirement) -> str | None:
    """What is wrong with the version that is installed, if anything is."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return f"{requirement.name} is missing"
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return f"{requirement.name} is {version}, not {requirement.specifier}"


def devices(survey: Survey, *, served: bool) -> Iterator[Finding]:
    """Check JAX's devices; ``served`` says that a server here may be using them."""
    found = survey.facts.get("devices")
    if found is None:
        why = f"JAX finds none ({survey.failure})"
        if served:
            yield Finding("Devices", "warning", f"{why}; the server that runs may hold them")
        else:
            fix = "JAX_PLATFORMS=cpu inferneo serve, until the driver works"
            yield Finding("Devices", "problem", why, fix)
        return
    kinds = found["kinds"]
    text = f"{len(kinds)} x {kinds[0]}, by JAX {metadata.version('jax')}"
    there = survey.facts.get("accelerator")
    if there and found["platform"] == "cpu" and not os.environ.get("JAX_PLATFORMS"):
        name, extra = _ACCELERATORS[there["platform"]]
        text += f", though this machine has {name}"
        yield Finding("Devices", "warning", text, f"pip install '{DISTRIBUTION}[{extra}]'")
        return
    yield Finding("Devices", "ok", text)


def memory(survey: Survey, weights: int) -> Iterator[Finding]:
    """Check whether ``weights`` bytes fit in the free memory."""
    found = survey.facts.get("devices")
    if found is None:
        return
    free = found["free_memory"]
    text = f"{in_bytes(free)} are free; the models' weights are {in_bytes(weights)}"
    if weights > free:
        yield Finding("Memory", "problem", text, "serve smaller models, or end other programs")
    elif 2 * weights > free:
        fix = "lower --slots or --max-len if the server says that memory ran out"
        yield Finding("Memory", "warning", f"{text}, which leaves little for the cache", fix)
    else:
        yield Finding("Memory", "ok", text)


def disk(folder: Path, to_fetch: int) -> Iterator[Finding]:
    """Check whether a folder can hold the models; ``to_fetch`` bytes are still to be downloaded."""
    place = existing(folder)
    free, needed = shutil.disk_usage(place).free, _UNPACKED * to_fetch
    text = f"{in_bytes(free)} are free at {folder}"
    if not os.access(place, os.W_OK):
        state: State = "problem" if to_fetch else "warning"
        fix = "choose another folder with INFERNEO_CHECKPOINTS"
        yield Finding("Disk", state, f"{folder} cannot be written to", fix)
    elif free < needed:
        text += f", and the models to fetch take up to {in_bytes(needed)}"
        yield Finding("Disk", "problem", text, "inferneo list, and inferneo rm what is not needed")
    elif free < _FREE_BYTES:
        yield Finding("Disk", "warning", text, "inferneo list, and inferneo rm what is not needed")
    else:
        yield Finding("Disk", "ok", text)


def kernels(survey: Survey, wanted: str) -> Iterator[Finding]:
    """Check the native kernels of a CPU, if the setting ``wanted`` uses them."""
    found = survey.facts.get("kernels")
    on_cpu = survey.facts.get("devices", {}).get("platform", "cpu") == "cpu"
    if not found or not on_cpu or wanted == "xla":
        return
    if found["why"]:
        state: State = "problem" if wanted == "native" else "warning"
        yield Finding("Kernels", state, found["why"], found["help"])
    elif found["compiled"]:
        yield Finding("Kernels", "ok", f"compiled by {found['compiler']}")
    else:
        text = f"{found['compiler']} compiles them at the first start, which takes some seconds"
        yield Finding("Kernels", "ok", text)
