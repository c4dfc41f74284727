"""The types that the schemas of several answers share.

The schema of an answer is a TypedDict beside what builds it: mypy checks the builder against it,
and the API's description is derived from it.
"""

from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

Count = Annotated[int, Field(ge=0)]
Null = Annotated[None, Field(description="Always null; other servers may send a value.")]


class Warned(TypedDict):
    """An answer that may carry warnings."""

    warnings: NotRequired[
        Annotated[
            list[str],
            Field(
                min_length=1,
                description="The parts of the request that had no effect; absent if all had one.",
            ),
        ]
    ]
