"""Checks of a GPU or TPU: its driver, the plugin by which JAX uses it, and the flags of XLA."""

from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from server.cli.doctor.finding import Finding
from server.cli.doctor.machine import DISTRIBUTION, Survey, wrong_version

_CHECK = "Accelerator"
_PLUGINS = {
    "gpu": {"cuda13": "jax-cuda13-plugin", "cuda12": "jax-cuda12-plugin"},
    "tpu": {"tpu": "libtpu"},
}
"""By platform, the distribution that an extra brings."""
_DRIVERS = {"cuda13": 580, "cuda12": 525}
"""The oldest driver for each CUDA: docs.nvidia.com/deploy/cuda-compatibility."""
_KERNELS_SINCE = 8.0
"""The compute capability from which on there are kernels."""


def accelerator(survey: Survey) -> Iterator[Finding]:
    """Check the accelerator of this machine, if there is one, and say which flags are set for it.

    An accelerator without a plugin is told with the devices.
    """
    found = survey.facts.get("accelerator")
    if not found:
        return
    plugins = _PLUGINS[found["platform"]]
    extra = next((each for each, plugin in plugins.items() if _version(plugin)), None)
    if extra is None:
        return
    plugin = plugins[extra]
    text = f"{plugin} {_version(plugin)}"
    if wrong := _wrong(plugin, extra):
        yield Finding(_CHECK, "problem", wrong, f"pip install --upgrade '{DISTRIBUTION}[{extra}]'")
        return
    if driver := found["driver"]:
        text = f"driver {driver}, {text}"
        major = int(driver.partition(".")[0])
        if major < _DRIVERS.get(extra, 0):
            older = next((e for e, least in _DRIVERS.items() if major >= least), None)
            yield Finding(
                _CHECK,
                "problem",
                f"{text}, which needs driver {_DRIVERS[extra]} or newer",
                f"pip uninstall {plugin}, then pip install '{DISTRIBUTION}[{older}]'"
                if older
                else "update the NVIDIA driver",
            )
            return
    capability = survey.facts.get("devices", {}).get("capability")
    if capability:
        text += f", compute capability {capability}"
        if float(capability) < _KERNELS_SINCE:
            text += "; the kernels need 8.0 or more, and attention is XLA's, several times slower"
            yield Finding(_CHECK, "warning", text, "take an Ampere GPU or a later one")
            return
    yield Finding(_CHECK, "ok", text)
    for flag in found["flags"]:
        yield Finding("Flag", "ok", f"{flag['variable']}: {flag['value']}; {flag['why']}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _wrong(plugin: str, extra: str) -> str | None:
    """What is wrong with the version of a plugin, by what JAX declares for this extra."""
    for text in metadata.requires("jax") or ():
        requirement = Requirement(text)
        asked = requirement.marker and requirement.marker.evaluate({"extra": extra})
        if requirement.name == plugin and asked and (found := wrong_version(requirement)):
            return f"{found}, which JAX {metadata.version('jax')} needs"
    return None
