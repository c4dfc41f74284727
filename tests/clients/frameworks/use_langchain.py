"""LangChain against the fake engine: what an answer holds, and what errors become."""

import asyncio

from common import CHAT, EMBED, KEY, LIMITED, LONG, SERVER, raised, say
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


def chat(url: str = SERVER, key: str = "unused", model: str = CHAT, **more: object) -> ChatOpenAI:
    return ChatOpenAI(base_url=url, api_key=key, model=model, max_retries=0, **more)


embeddings = OpenAIEmbeddings(
    base_url=SERVER, api_key="unused", model=EMBED, check_embedding_ctx_length=False
)
strict = chat(default_headers={"X-Inferneo-Strict": "true"})
chunks = list(chat(stream_usage=True).stream("Hi"))
scored = chat().bind(logprobs=True, top_logprobs=2).invoke("Hi")
tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
say(
    plain=chat().invoke("Hi").content,
    strict=strict.invoke("Hi").content,
    streamed="".join(chunk.content for chunk in chunks),
    usage=[chunk.usage_metadata for chunk in chunks if chunk.usage_metadata][-1],
    batch=[message.content for message in chat().batch(["a", "b", "c"])],
    awaited=asyncio.run(chat().ainvoke("Hi")).content,
    stopped=chat(stop=["END"]).invoke("Hi").content,
    extra=chat(extra_body={"top_k": 3}).invoke("Hi").content,
    finish_reason=chat(max_tokens=3).invoke("Hi").response_metadata["finish_reason"],
    logprobs=[
        len(each["top_logprobs"]) for each in scored.response_metadata["logprobs"]["content"]
    ],
    vectors=[len(vector) for vector in embeddings.embed_documents(["a", "b"])],
    vector=len(embeddings.embed_query("a")),
    too_long=raised(lambda: chat().invoke(LONG)),
    no_model=raised(lambda: chat(model="none").invoke("Hi")),
    wrong_key=raised(lambda: chat(LIMITED, "sk-wrong").invoke("Hi")),
    right_key=raised(lambda: chat(LIMITED, KEY).invoke("Hi")),
    limited=raised(lambda: chat(LIMITED, KEY).invoke("Hi")),
    tools=raised(lambda: strict.bind_tools([tool]).invoke("Hi")),
)
