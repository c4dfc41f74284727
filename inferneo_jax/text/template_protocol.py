"""What the process that renders chat templates and the one that asks it agree on.

A request is a header, a template's source and a context: JSON, or nothing to have the template
compiled only. An answer is a header and a text. Both texts are UTF-8.
"""

import struct

MAX_CHARACTERS = 8_000_000
"""Longest text that a template may render; far above any model's context."""
MAX_BYTES = 4 * MAX_CHARACTERS
"""Longest text of an answer, encoded."""
MAX_ERROR_CHARACTERS = 1000
"""Longest description of an error."""
MAX_REQUEST_BYTES = 64 << 20
"""Longest request; it is read before it is parsed, so it must fit the worker's memory."""
MEMORY_BYTES = 256 << 20
"""Address space of a worker beyond what it takes when it starts."""

REQUEST = struct.Struct("!dII")
"""The seconds of CPU time that the request may take, and the lengths of source and context."""
ANSWER = struct.Struct("!cBI")
"""One of the kinds below, whether the worker ends after this answer, and the length of the text."""

READY = b"+"
"""The worker has started; sent once, unasked."""
TEXT = b"t"
"""The rendered text; for a template that is compiled only, the names of the variables it reads."""
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
