"""What the tests of this folder read."""

import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import yaml

from tests.support.paths import ROOT

DEPLOY = ROOT / "docs" / "deploy"
GOODBYE_SECONDS = 2
"""What the server takes to end after it has drained."""
SCRIPTS = Path(sysconfig.get_path("scripts"))


def read(path: Path) -> Any:
    """A file of YAML."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def read_all(path: Path) -> list[Any]:
    """The documents of a file of YAML."""
    return list(yaml.safe_load_all(path.read_text(encoding="utf-8")))


def check(*command: str | Path, **options: Any) -> str:
    """What a program printed; it must end well."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)
