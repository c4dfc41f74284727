"""What the configuration of a model may say, whoever wrote it."""

import dataclasses
import math
from typing import Any, Literal, get_args, get_origin

from inferneo_jax.errors import ConfigError
from inferneo_jax.files import shown

MAX_VOCAB_SIZE = 2**20
"""Largest vocabulary; the largest in use has 262,144 tokens."""

# Several times what the largest models in use have: a configuration beyond is a mistake or an
# attack, and is refused before anything of these sizes is made.
_MAX_SIZES = {
    "vocab_size": MAX_VOCAB_SIZE,
    "hidden_size": 2**17,
    "mlp_size": 2**19,
    "num_layers": 512,
    "num_heads": 2**10,
    "num_kv_heads": 2**10,
    "head_dim": 2**12,
    "context_length": 2**24,
    "original_context_length": 2**24,
    "num_positions": 2**24,
    "max_tokens": 2**24,
    "num_token_types": 2**8,
}


def check_fields(config: Any) -> None:
    """Raises ConfigError unless every field of a model's configuration has its type and bounds."""
    for each in dataclasses.fields(config):
        value, wanted = getattr(config, each.name), ""
        if each.type is int:
            least, most = 0 if each.default == 0 else 1, _MAX_SIZES[each.name]
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                wanted = f"an integer from {least} to {most}"
        elif each.type is float:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 < value < math.inf:
                wanted = "a number above 0"
        elif each.type is bool:
            wanted = "" if isinstance(value, bool) else "true or false"
        elif get_origin(each.type) is Literal and value not in (known := get_args(each.type)):
            wanted = " or ".join(known)
        if wanted:
            raise ConfigError(f"{each.name} is {shown(value)}; it must be {wanted}")
