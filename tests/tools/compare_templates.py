"""Compare chat templates of a folder, rendered by this package, with transformers' renderings.

Usage: python -m tests.tools.compare_templates FOLDER

FOLDER holds ``*.jinja`` files. Many models' are in llama.cpp, and so in the source distribution of
llama-cpp-python (vendor/llama.cpp/models/templates). Prints each difference, and for how many
templates every conversation gives the same bytes, or an error on both sides.
"""

import sys
from pathlib import Path

from tests.support.template_reference import by_transformers, by_us, cases


def main() -> None:
    equal = compared = texts = 0
    files = sorted(Path(sys.argv[1]).glob("*.jinja"))
    for file in files:
        source, differences, written = file.read_text(encoding="utf-8"), 0, 0
        for name, messages, options in cases():
            theirs = by_transformers(source, messages, **options)
            ours = by_us(source, messages, **options)
            compared += 1
            written += theirs is not None
            if ours != theirs:
                differences += 1
                print(f"{file.name}: {name}\n  theirs: {theirs!r}\n  ours:   {ours!r}")
        equal += not differences
        texts += written
        if not written:
            print(f"{file.name}: transformers renders none of the conversations")
    print(f"{equal} of {len(files)} templates equal: {compared} renderings, {texts} of them texts")
    sys.exit(equal != len(files) or not files)


if __name__ == "__main__":
    main()
