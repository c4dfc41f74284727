"""The registry of model families. A new family is a module here and an entry in ``FAMILIES``."""

from inferneo_jax.errors import ConfigError
from inferneo_jax.files import shown
from inferneo_jax.models.families.bert import BERT
from inferneo_jax.models.families.family import Family, HFConfig, names
from inferneo_jax.models.families.llama import LLAMA
from inferneo_jax.models.families.nomic_bert import NOMIC_BERT
from inferneo_jax.models.families.phi3 import PHI3
from inferneo_jax.models.families.qwen2 import QWEN2
from inferneo_jax.models.families.qwen3 import QWEN3

FAMILIES = (LLAMA, QWEN2, QWEN3, PHI3, BERT, NOMIC_BERT)


def find_family(config: HFConfig) -> Family:
    """The family of a model, by its architecture, or by its model type if it names none.

    Raises:
        ConfigError: no family supports it; the message lists the supported architectures.
    """
    architectures = names(config, "architectures")
    model_type = config.get("model_type")
    model_type = model_type if isinstance(model_type, str) else None
    for family in FAMILIES:
        if family.architectures & set(architectures):
            return family
        if not architectures and model_type in family.model_types:
            return family
    known = ", ".join(sorted(a for family in FAMILIES for a in family.architectures))
    named = f"architecture {shown(', '.join(architectures))}" if architectures else None
    raise ConfigError(
        f"the {named or f'model_type {shown(model_type)}'} is not supported; supported are {known}"
    )


__all__ = ["FAMILIES", "Family", "find_family"]
