"""LlamaIndex against the fake engine: what an answer holds, and what errors become."""

import asyncio

from common import CHAT, EMBED, KEY, LIMITED, LONG, SERVER, raised, say
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike

HI = [ChatMessage(role="user", content="Hi")]


def llm(url: str = SERVER, key: str = "unused", model: str = CHAT, **more: object) -> OpenAILike:
    kinds = {"is_chat_model": True} | more
    return OpenAILike(model=model, api_base=url, api_key=key, max_retries=0, **kinds)


embedding = OpenAILikeEmbedding(model_name=EMBED, api_base=SERVER, api_key="unused")
texts = ["ab", "xyz"]
index = VectorStoreIndex.from_documents(
    [Document(text=text) for text in texts], embed_model=embedding
)
bare = llm(is_chat_model=False)
say(
    plain=llm().chat(HI).message.content,
    streamed="".join(part.delta for part in llm().stream_chat(HI)),
    awaited=asyncio.run(llm().achat(HI)).message.content,
    bare=bare.complete("Hi", max_tokens=99).text,
    bare_streamed="".join(part.delta for part in bare.stream_complete("Hi", max_tokens=99)),
    usage=llm().chat(HI).raw.usage.total_tokens,
    stopped=llm(additional_kwargs={"stop": ["END"]}).chat(HI).message.content,
    extra=llm(additional_kwargs={"extra_body": {"top_k": 3}}).chat(HI).message.content,
    logprobs=[len(each) for each in llm(logprobs=True, top_logprobs=2).chat(HI).logprobs],
    vectors=[len(vector) for vector in embedding.get_text_embedding_batch(texts)],
    retrieved=[found.text for found in index.as_retriever(similarity_top_k=1).retrieve("xyz")],
    too_long=raised(lambda: llm().complete(LONG)),
    no_model=raised(lambda: llm(model="none").chat(HI)),
    wrong_key=raised(lambda: llm(LIMITED, "sk-wrong").chat(HI)),
    right_key=raised(lambda: llm(LIMITED, KEY).chat(HI)),
    limited=raised(lambda: llm(LIMITED, KEY).chat(HI)),
)
