"""The protocol between a process that renders chat templates and the process that asks it to.

A request is a header, a template's source and a context as JSON; without a context the template is
only compiled. An answer is a header and a text. All texts are UTF-8.

This is a separate module because the renderer imports nothing else of this package.
"""

import struct

MAX_CHARACTERS = 8_000_000
"""Maximum length of a rendered text, far above any model's context."""
MAX_BYTES = 4 * MAX_CHARACTERS
"""Maximum length of an answer's text, encoded."""
MAX_ERROR_CHARACTERS = 1000
"""Maximum length of an error's description."""
MAX_REQUEST_BYTES = 64 << 20
"""Maximum length of a request, which must fit into the worker's memory before it is parsed."""
MEMORY_BYTES = 256 << 20
"""Address space of a worker beyond what it has when it starts."""

REQUEST = struct.Struct("!dII")
"""The CPU time in seconds that the request may take, and the lengths of source and context."""
ANSWER = struct.Struct("!cBI")
"""One of the kinds below, whether the worker exits after this answer, and the text's length."""

READY = b"+"
"""The worker has started; sent once, without a request."""
TEXT = b"t"
"""The rendered text; for a template that is only compiled, the names of its variables."""
SYNTAX = b"s"
"""The source is not a template; the text says why."""
REFUSED = b"r"
"""The template, or Jinja's sandbox, refused the context; the text says why."""
FAILED = b"f"
"""The template failed on this context; the text says why."""
TOO_LONG = b"l"
"""The template wrote more than MAX_CHARACTERS."""
TOO_DEEP = b"d"
"""The template or the context is nested too deeply."""
MEMORY = b"m"
"""The template needed more than MEMORY_BYTES."""
