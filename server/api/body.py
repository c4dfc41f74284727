"""The base class of request bodies, and their validation."""

from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from server.http.codec import parse_object, read_json
from server.http.errors import as_api_error, bad_request
from server.prompt.cpu_pool import INLINE_BYTES, CpuPool
from server.run.context import Context

Result = TypeVar("Result")

MAX_NAME = 512
"""Maximum number of characters in ``user`` and ``cache_salt``."""

_LONGEST_NAME = 100
_MOST_NAMED = 20
"""Maximum number of unknown parameters that warnings name."""

_ANNOTATIONS: tuple[str, ...] = ("description", "default", "examples")


class Body(BaseModel):
    """A request body.

    Values must have the right JSON type: a string is not accepted as a number. ``null`` counts as
    absent. Unknown fields are kept, so that a warning can name them.
    """

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            known = cls.model_fields
            return {k: value for k, value in values.items() if value is not None or k not in known}
        return values

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the schema, which allows null where ``_drop_nulls`` does."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        required = schema.get("required", ())
        for name, field in schema["properties"].items():
            factory = cls.model_fields[name].default_factory
            if factory is not None:
                field["default"] = factory()  # type: ignore[call-arg]  # none takes other fields
            if name not in required:
                schema["properties"][name] = _or_null(field)
        return reference

    def unknown(self) -> list[str]:
        """Return the names of unknown fields, including nested ones with their path."""
        return sorted(self.model_extra or ())


def _or_null(schema: JsonSchemaValue) -> JsonSchemaValue:
    """Return a schema that also accepts null; annotations stay outside the alternatives."""
    if {"type": "null"} in schema.get("anyOf", ()):
        return schema
    outside = {key: schema[key] for key in _ANNOTATIONS if key in schema}
    inside = {key: value for key, value in schema.items() if key not in outside}
    options = inside["anyOf"] if inside.keys() == {"anyOf"} else [inside]
    return {"anyOf": [*options, {"type": "null"}], **outside}


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(
    cpu_pool: CpuPool,
    context: Context,
    work: Callable[[dict[str, Any]], Result],
    *,
    inline: bool = True,
    blocks: Callable[[dict[str, Any]], bool] = lambda _: False,
) -> Result:
    """Parse the body of the current request and return the result of ``work`` on it.

    The size of the body decides whether all of this, parsing, validation and ``work``, runs on the
    event loop or in a thread.

    Args:
        cpu_pool: has the threads.
        context: of the request.
        work: what is done with the body.
        inline: whether ``work`` on a small body may run on the event loop; False if it may block.
        blocks: whether it may block nevertheless, by the content of the body.

    Raises:
        ApiError: as ``work``, ``CpuPool.run``, ``read_json`` and ``parse_object`` do.
    """
    raw = await read_json()
    fields = parse_object(raw) if inline and len(raw) <= INLINE_BYTES else None
    return await cpu_pool.run(
        len(raw),
        lambda: work(parse_object(raw) if fields is None else fields),
        owner=context.caller.id,
        deadline=context.deadline,
        inline=fields is not None and not blocks(fields),
    )


def validate(kind: type[AnyBody], fields: Any, *, strict: bool) -> tuple[AnyBody, list[str]]:
    """Return the validated body, and warnings about unknown fields in it.

    Raises:
        ApiError: a field is missing or invalid, or a field is unknown and ``strict`` is set.
    """
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise as_api_error(error) from None
    unknown = body.unknown()
    if unknown and strict:
        raise bad_request(
            f"{unknown[0][:_LONGEST_NAME]} is not a parameter of this endpoint. Remove it, or "
            "leave out the header X-Inferneo-Strict.",
            unknown[0][:_LONGEST_NAME],
        )
    named = [name[:_LONGEST_NAME] for name in unknown[:_MOST_NAMED]]
    warnings = [f"{name} is not a parameter of this endpoint; ignored." for name in named]
    if len(unknown) > _MOST_NAMED:
        rest = len(unknown) - _MOST_NAMED
        warnings.append(f"{rest} more are not parameters of this endpoint; ignored.")
    return body, warnings
