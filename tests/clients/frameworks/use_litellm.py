"""LiteLLM against the fake engine: what an answer holds, and what errors become."""

import asyncio

import litellm
from common import CHAT, EMBED, KEY, LIMITED, LONG, SERVER, raised, say

litellm.suppress_debug_info = True
HI = [{"role": "user", "content": "Hi"}]


def options(url: str = SERVER, key: str = "unused", model: str = CHAT) -> dict[str, object]:
    return {"model": f"openai/{model}", "api_base": url, "api_key": key, "max_retries": 0}


def complete(*place: str, content: str = "Hi", **more: object) -> litellm.ModelResponse:
    messages = [{"role": "user", "content": content}]
    return litellm.completion(messages=messages, **options(*place), **more)


def text(answer: litellm.ModelResponse) -> str:
    return answer.choices[0].message.content


chunks = list(complete(stream=True, stream_options={"include_usage": True}))
bare = options() | {"model": f"text-completion-openai/{CHAT}"}
scored = complete(logprobs=True, top_logprobs=2).choices[0].logprobs.content
say(
    plain=text(complete()),
    streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
    usage=[chunk.usage.total_tokens for chunk in chunks if getattr(chunk, "usage", None)][-1],
    awaited=text(asyncio.run(litellm.acompletion(messages=HI, **options()))),
    bare=litellm.text_completion(prompt="Hi", max_tokens=99, **bare).choices[0].text,
    stopped=text(complete(stop=["END"])),
    extra=text(complete(extra_body={"top_k": 3})),
    finish_reason=complete(max_tokens=3).choices[0].finish_reason,
    logprobs=[len(each.top_logprobs) for each in scored],
    vectors=[
        len(each["embedding"])
        for each in litellm.embedding(input=["a", "b"], **options(model=EMBED)).data
    ],
    too_long=raised(lambda: complete(content=LONG)),
    no_model=raised(lambda: complete(SERVER, "unused", "none")),
    wrong=raised(lambda: complete(temperature=9)),
    wrong_key=raised(lambda: complete(LIMITED, "sk-wrong")),
    right_key=raised(lambda: complete(LIMITED, KEY)),
    limited=raised(lambda: complete(LIMITED, KEY)),
)
