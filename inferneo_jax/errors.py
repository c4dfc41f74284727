"""Every exception that leaves this package.

::

    InferneoError
     |- ConfigError              a setting or a model configuration that cannot work
     |- JobError                 the processes of a job do not agree, or one of them is lost
     |- CheckpointError          a model on disk, or its source, that cannot be used
     |   |- FetchError           it could not be downloaded, or its hash is wrong
     |   |- WeightsError         missing, unused or misshapen weights, named
     |   `- TokenizerError       no tokenizer, or one of a kind that is not supported
     |- RequestError             one request that cannot be served as it stands
     |   |- ContextLengthError   prompt and max_tokens do not fit the context
     |   |- TemplateError        the chat template rejected the messages
     |   `- ConstraintError      the grammar cannot be compiled, or became too complex
     `- EngineError              the engine cannot serve any request now
         |- OverloadedError      it cannot accept a request now, but may soon
         |- EngineStoppedError   it was told to stop
         `- EngineFailedError    a step raised (the cause is chained) or did not return
"""


class InferneoError(Exception):
    """Base class of every error of this package; its message is written for the user."""


class ConfigError(InferneoError):
    """A setting or a model configuration that cannot work."""


class JobError(InferneoError):
    """The processes of a job do not agree, or one of them is lost."""


class CheckpointError(InferneoError):
    """A model on disk, or its source, that cannot be used."""


class FetchError(CheckpointError):
    """A model that could not be downloaded, or whose hash is wrong."""


class WeightsError(CheckpointError):
    """Weights that are missing, unused or misshapen; the message names each of them."""


class TokenizerError(CheckpointError):
    """A checkpoint without a tokenizer, or with a kind of tokenizer that is not supported."""


class RequestError(InferneoError):
    """A request that cannot be served as it stands.

    Attributes:
        param: the request field at fault, or None.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ContextLengthError(RequestError):
    """The prompt and the requested tokens together exceed the model's context."""


class TemplateError(RequestError):
    """The chat template rejected the messages."""


class ConstraintError(RequestError):
    """A grammar that cannot be compiled, or that became too complex while it was matched."""


class EngineError(InferneoError):
    """The engine cannot serve any request now."""


class OverloadedError(EngineError):
    """The engine cannot accept a request now; the same request may succeed later."""


class EngineStoppedError(EngineError):
    """The engine was told to stop before the request was finished."""


class EngineFailedError(EngineError):
    """A step of the engine raised (the cause is chained) or did not return in time."""
