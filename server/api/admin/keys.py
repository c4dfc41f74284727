"""``/admin/keys``: what requests may hold. Names that are not known are always refused there."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from server.api.openai.common import Body
from server.keys.key import Scope

_MOST = 10**12
_NAME = "For people: 1 to 100 characters, all of them visible."
Limit = Annotated[int, Field(ge=1, le=_MOST)] | Literal["none"]
Expiry = Annotated[int, Field(ge=1, le=10**10)] | Literal["never"]


class AdminBody(Body):
    """A body whose routes validate it strictly, whatever the request's headers say."""

    model_config = ConfigDict(json_schema_extra={"additionalProperties": False})


class LimitsBody(AdminBody):
    """Limits of a key; those that are left out stay as they are."""

    requests: Limit | None = Field(None, description="Requests a minute.")
    tokens: Limit | None = Field(None, description="Tokens a minute, of prompts and answers.")
    day_requests: Limit | None = Field(None, description="Requests a day of UTC.")
    concurrent: Limit | None = Field(None, description="Requests that run at once.")


class ChangeKeyBody(AdminBody):
    """What is to change of a key; what is left out stays."""

    name: str | None = Field(None, description=_NAME)
    scopes: list[Scope] | None = Field(
        None, min_length=1, max_length=10, fail_fast=True, description="What it may be used for."
    )
    models: list[str] | None = Field(
        None,
        max_length=1000,
        fail_fast=True,
        description="Ids or aliases that it may use; empty: all.",
    )
    limits: LimitsBody | None = Field(None, description="What it may take.")
    expires_in: Expiry | None = Field(
        None, description="Seconds from now until it ends by itself, or `never`."
    )

    def unknown(self) -> list[str]:
        """Names in the body, and in its limits, that are not known."""
        nested = self.limits.unknown() if self.limits else []
        return sorted([*super().unknown(), *(f"limits.{name}" for name in nested)])


class NewKeyBody(ChangeKeyBody):
    """A new key; what is left out has its default."""

    name: str = Field(description=_NAME)
