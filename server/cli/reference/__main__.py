"""``python -m server.cli.reference FOLDER``: writes the pages, as ``make docs`` does."""

import sys
from pathlib import Path

from server.cli.reference import pages

if len(sys.argv) != 2:
    sys.exit("usage: python -m server.cli.reference FOLDER")
folder = Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
for name, text in pages().items():
    (folder / name).write_text(text, encoding="utf-8")
    print(folder / name)
