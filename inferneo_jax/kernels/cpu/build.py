"""Builds the kernels in ``native/`` with the machine's C++ compiler and registers them with XLA.

All kernels are one cached library. Its sources, ``native/*.cc``, are compiled in parallel.
To add a kernel, write a source of its own that ends in its binding,
``XLA_FFI_DEFINE_HANDLER_SYMBOL(name, ...)``, and call it inside a jitted function as
``library().call("name", results, *arguments, **attributes)``.

A library runs on the CPU that it was compiled for. The preprocessor knows that CPU's instructions
(``__AVX512VNNI__``), so all variants have the same source and differ in compiler flags.
"""

import ctypes
import errno
import hashlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from jaxtyping import Array

log = logging.getLogger(__name__)

Variant = Literal["native", "avx2", "portable"]
"""``native`` uses all instructions of this CPU; the others are those that older CPUs would run."""

_FLAGS: dict[Variant, tuple[str, ...]] = {
    "native": ("-march=native",),
    "avx2": ("-march=x86-64-v3",),
    "portable": (),
}
_COMMON = ("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
# Results must not depend on which products and sums the compiler chooses to fuse.
_EXACT = ("-ffp-contract=off",)
_COMPILERS = ("c++", "g++", "clang++")
_COMPILE_SECONDS = 300
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_NATIVE = Path(__file__).parent / "native"
HELP = (
    "install one (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install) or name one "
    "with CXX; products and attention run several times slower in XLA's own operations"
)


@dataclass(frozen=True)
class Library:
    """A compiled library of kernels.

    Attributes:
        variant: the instructions that it was compiled for.
        path: of its file.
    """

    variant: Variant
    path: Path
    _handle: ctypes.CDLL

    def call(
        self,
        kernel: str,
        results: Any,
        *arguments: Array,
        aliases: dict[int, int] | None = None,
        **attributes: Any,
    ) -> Any:
        """Call a kernel inside a traced function.

        Args:
            kernel: its name in ``native``.
            results: shapes and dtypes of its results, in any form that ``jax.ffi.ffi_call`` takes.
            arguments: of the call.
            aliases: from an argument's index to that of the result that overwrites it.
            attributes: numpy scalars or strings, constant in the trace.

        Returns:
            The results, in the form of ``results``.
        """
        target = self._target(kernel)
        call: Any = jax.ffi.ffi_call(target, results, input_output_aliases=aliases)
        return call(*arguments, **attributes)

    def host(self, function: str) -> Any:
        """A function that the host calls itself, with ctypes, which releases the interpreter."""
        return getattr(self._handle, function)

    def register(self) -> None:
        """Register all kernels: a cached program calls them without having been traced."""
        bindings = "".join(path.read_text(encoding="utf-8") for path in _NATIVE.iterdir())
        for kernel in re.findall(r"XLA_FFI_DEFINE_HANDLER_SYMBOL\(\s*(\w+)", bindings):
            target = self._target(kernel)
            if target not in _REGISTERED:  # XLA accepts a name only once
                handler = jax.ffi.pycapsule(getattr(self._handle, kernel))
                jax.ffi.register_ffi_target(target, handler, platform="cpu")
                _REGISTERED.add(target)

    def _target(self, kernel: str) -> str:
        """The name under which XLA knows a kernel of this variant."""
        return f"inferneo_{self.variant}_{kernel}"


_LOCK = threading.Lock()
_MADE: dict[Variant, Library | None] = {}
_REGISTERED: set[str] = set()


def library(variant: Variant = "native") -> Library | None:
    """The library, compiled if needed: in seconds the first time, later found in milliseconds.

    Returns:
        None if it cannot be compiled; the log says so once.
    """
    with _LOCK:
        if variant not in _MADE:
            _MADE[variant] = made = _make(variant, _cache_folder())
            if made:
                made.register()
        return _MADE[variant]


def chosen(variant: Variant) -> Library:
    """The library, for callers that are chosen only if there is one."""
    made = library(variant)
    assert made, "quantization and attention of these kernels are chosen only if there is a library"
    return made


def start_building() -> None:
    """Start compiling the kernels in the background, if needed; ``library`` waits for them."""
    threading.Thread(target=library, name="kernels", daemon=True).start()


def look(variant: Variant = "native") -> tuple[str | None, bool, str | None]:
    """Report what ``library`` would find, without compiling anything or changing a file.

    Returns:
        The compiler, if any; whether the library exists already; why it cannot be compiled.
    """
    compiler = _compiler()
    if compiler is None:
        return None, False, "no C++ compiler was found"
    flags = _flags(variant)
    try:
        # This tests that a standard library is installed.
        _run(compiler, *flags, "-fsyntax-only", "-include", "algorithm", "-x", "c++", os.devnull)
        return compiler, _there(_cache_folder(), _key(compiler, flags)) is not None, None
    except (subprocess.SubprocessError, OSError) as error:
        return compiler, False, _complaint(compiler, error)


def _make(variant: Variant, folder: Path) -> Library | None:
    compiler = _compiler()
    if compiler is None:
        log.warning("no C++ compiler was found: %s", HELP)
        return None
    try:
        path = _cached(compiler, variant, folder)
        return Library(variant, path, ctypes.CDLL(str(path)))
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("%s: %s", _complaint(compiler, error), HELP)
    return None


def _complaint(compiler: str, error: subprocess.SubprocessError | OSError) -> str:
    if isinstance(error, OSError):
        return f"the compiled kernels cannot be used ({error})"
    said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
    first = next((line for line in said if "error" in line), said[-1])
    return f"{compiler} cannot compile the kernels ({first})"


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    names = (named,) if named else _COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def _cache_folder() -> Path:
    """The user's cache folder (XDG Base Directory Specification)."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "inferneo" / "kernels"


def _cached(compiler: str, variant: Variant, folder: Path) -> Path:
    """The library's file, compiled unless a complete one exists.

    Its name has a hash of everything that it is made of, and a hash of its content, so that a
    truncated or modified file is not loaded. (The loader would map it and crash.) The file is
    created by a rename, complete, and several processes may create it at once.
    """
    flags = _flags(variant)
    key = _key(compiler, flags)
    if path := _there(folder, key):
        return path
    try:
        for path in folder.glob(f"{key}-*.so"):
            path.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return _compile(compiler, flags, Path(scratch), folder, key)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        # The cache folder cannot be written to: every process compiles its own library.
        folder = Path(tempfile.mkdtemp(prefix="inferneo-kernels-"))
        return _compile(compiler, flags, folder, folder, key)


def _there(folder: Path, key: str) -> Path | None:
    """The complete library with this key, if it exists."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if path.stem == f"{key}-{_hash(path.read_bytes())}":
            return path
    return None


def _flags(variant: Variant) -> tuple[str, ...]:
    return (*_COMMON, *_EXACT, *_FLAGS[variant])


def _compile(compiler: str, flags: Sequence[str], scratch: Path, folder: Path, key: str) -> Path:
    def compiled(source: Path) -> str:
        made = scratch / f"{source.stem}.o"
        _run(compiler, *flags, "-c", "-o", str(made), str(source), "-isystem", _headers())
        return str(made)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sorted(_NATIVE.glob("*.cc"))))
    made = scratch / "kernels.so"
    _run(compiler, *flags, "-shared", "-o", str(made), *objects)
    target = folder / f"{key}-{_hash(made.read_bytes())}.so"
    made.replace(target)
    return target


def _key(compiler: str, flags: Sequence[str]) -> str:
    """A hash of the sources, the interface to XLA, the compiler and the CPU.

    The compiler's predefined macros tell its version and the instructions it may use.
    """
    predefined = _run(compiler, *flags, "-dM", "-E", "-x", "c++", os.devnull)
    # Each sorted by itself: their order must not depend on where either folder is.
    sources = [*sorted(_NATIVE.iterdir()), *sorted(Path(_headers()).rglob("*.h"))]
    parts = [predefined.encode(), *(path.read_bytes() for path in sources)]
    return _hash(repr(flags).encode(), *parts)


def _hash(*parts: bytes) -> str:
    """128 bits of SHA-256, in hexadecimal."""
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[
        :32
    ]


def _headers() -> str:
    return jax.ffi.include_dir()


def _run(*command: str) -> str:
    return subprocess.run(  # noqa: S603  (the user's compiler, on our own sources)
        command, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS
    ).stdout
