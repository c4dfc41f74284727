"""Every operation of the API; a test holds this list to the application's routes."""

from server.api import answers, states
from server.api.openai.chat import ChatBody
from server.api.openai.completions import CompletionBody
from server.api.openai.embeddings import EmbeddingBody
from server.api.openapi import admin
from server.api.openapi.operation import BODY_ERRORS, Answer, Operation, errors, json, ok
from server.api.system.docs import ASSETS
from server.api.vllm.tokenize import DetokenizeBody, TokenizeChatBody, TokenizeTextBody
from server.web.pages import page_files

_EXAMPLE_CHAT = "smollm2-135m-instruct"
_EXAMPLE_EMBEDDING = "all-minilm-l6-v2"
_HELLO = [{"role": "user", "content": "Hello!"}]

_SOCKET = (
    "The path takes WebSocket connections too: send such a body as a text frame, and the answer "
    "comes in frames. See the description at the top."
)


def _streamed(whole: type[answers.Generated], event: type[answers.Generated]) -> dict[int, Answer]:
    return {
        200: Answer(
            description="The whole answer, or with `stream` its chunks as events: "
            f"`data: {{...}}`, each a {event.__name__}, and at the end `data: [DONE]`. What fails "
            'after the first of them is an event `{"error": {...}}`.',
            content=json(whole),
            events=event,
        )
    }


def _page() -> dict[int, Answer]:
    return {
        200: Answer(
            description="A page; everything that it loads comes from this server.",
            content={"text/html": {"type": "string"}},
            headers=("Content-Security-Policy",),
        )
    } | errors()


def _file(*kinds: str) -> dict[int, Answer]:
    found = Answer(description="The file.", content={kind: {} for kind in kinds})
    return {200: found} | errors(404)


OPERATIONS = (
    Operation(
        path="/v1/models",
        name="listModels",
        tag="models",
        summary="List the models served",
        answers=ok(states.ModelList) | errors(401, 403, 503),
    ),
    Operation(
        path="/v1/models/{model_id}",
        name="getModel",
        tag="models",
        summary="Get a model by its id or alias",
        parameters={
            "model_id": (
                {"type": "string", "minLength": 1},
                "Ids may hold slashes, written as they are or as %2F.",
            )
        },
        answers=ok(states.ModelDetails) | errors(401, 403, 404, 503),
    ),
    Operation(
        path="/v1/completions",
        method="post",
        name="createCompletion",
        tag="generation",
        summary="Continue a text",
        description=_SOCKET,
        body=(CompletionBody,),
        answers=_streamed(answers.Completion, answers.CompletionChunk) | BODY_ERRORS,
        example={"model": _EXAMPLE_CHAT, "prompt": "Once upon a time", "max_tokens": 32},
    ),
    Operation(
        path="/v1/chat/completions",
        method="post",
        name="createChatCompletion",
        tag="generation",
        summary="Continue a conversation",
        description=_SOCKET,
        body=(ChatBody,),
        answers=_streamed(answers.ChatCompletion, answers.ChatCompletionChunk) | BODY_ERRORS,
        example={"model": _EXAMPLE_CHAT, "messages": _HELLO, "max_tokens": 64},
    ),
    Operation(
        path="/v1/embeddings",
        method="post",
        name="createEmbeddings",
        tag="embeddings",
        summary="Embed texts",
        body=(EmbeddingBody,),
        answers=ok(answers.EmbeddingList) | BODY_ERRORS,
        example={"model": _EXAMPLE_EMBEDDING, "input": ["Hello!"]},
    ),
    Operation(
        path="/tokenize",
        method="post",
        name="tokenize",
        tag="tokens",
        summary="Get the token ids of a text or a conversation",
        description="Send `prompt` or `messages`, as to vLLM.",
        body=(TokenizeTextBody, TokenizeChatBody),
        answers=ok(answers.TokenList) | BODY_ERRORS,
        example={"model": _EXAMPLE_CHAT, "prompt": "Hello!", "return_token_strs": True},
    ),
    Operation(
        path="/detokenize",
        method="post",
        name="detokenize",
        tag="tokens",
        summary="Get the text of token ids",
        description="Special tokens are written out; bytes that are no UTF-8 become U+FFFD.",
        body=(DetokenizeBody,),
        answers=ok(answers.Detokenized) | BODY_ERRORS,
        example={"model": _EXAMPLE_CHAT, "tokens": [19556, 17]},
    ),
    Operation(
        path="/v1/usage",
        name="getUsage",
        tag="keys",
        summary="Get the limits and the usage of the caller's own key",
        answers=ok(states.KeyUsage) | errors(400, 401, 403, 503),
    ),
    Operation(
        path="/v1/ws-tickets",
        method="post",
        name="createTicket",
        tag="keys",
        summary="Get a one-use ticket for a WebSocket of a web page",
        answers=ok(states.SocketTicket) | errors(400, 401, 403, 503),
    ),
    Operation(
        path="/health",
        name="health",
        tag="server",
        summary="Ask whether the process answers",
        answers=ok(states.Health) | errors(),
    ),
    Operation(
        path="/ready",
        name="ready",
        tag="server",
        summary="Ask whether requests can be served, and how full the server is",
        answers=ok(states.Ready)
        | errors()
        | {503: Answer(description="Not yet, or not any more.", content=json(states.Unready))},
    ),
    Operation(
        path="/version",
        name="version",
        tag="server",
        summary="Get the server's version",
        answers=ok(states.Version) | errors(),
    ),
    Operation(
        path="/openapi.json",
        name="openapi",
        tag="server",
        summary="Get this description",
        answers=ok(states.Document) | errors(),
    ),
    Operation(
        path="/metrics",
        name="metrics",
        tag="server",
        summary="Get figures for Prometheus",
        description="Names, labels and units are vLLM's where the meaning is the same. With a key, "
        "it needs the scope `metrics`.",
        answers={
            200: Answer(
                description="The figures, in Prometheus' text form.",
                content={"text/plain": {"type": "string"}},
            )
        }
        | errors(401, 403),
    ),
    Operation(
        path="/",
        name="chatPage",
        tag="server",
        summary="Chat in a browser",
        answers=_page(),
    ),
    Operation(
        path="/dashboard",
        name="dashboardPage",
        tag="server",
        summary="Watch the server in a browser",
        answers=_page(),
    ),
    Operation(
        path="/docs",
        name="docs",
        tag="server",
        summary="Read this description in a browser",
        answers=_page(),
    ),
    Operation(
        path="/pages/{file}",
        name="pageFile",
        tag="server",
        summary="Get a file of the pages",
        parameters={"file": ({"type": "string", "enum": page_files()}, "The file's name.")},
        answers=_file("image/svg+xml", "text/css", "text/javascript"),
    ),
    Operation(
        path="/docs/{file}",
        name="docsFile",
        tag="server",
        summary="Get a file of Swagger UI",
        parameters={"file": ({"type": "string", "enum": sorted(ASSETS)}, "The file's name.")},
        answers=_file(*sorted(set(ASSETS.values()))),
    ),
    *admin.OPERATIONS,
)
