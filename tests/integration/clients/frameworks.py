"""LangChain's and LlamaIndex's clients: ``frameworks.py BASE_URL COLLECTION``, which must hold something."""

from __future__ import annotations

import asyncio
import sys

from langchain_openai import ChatOpenAI
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai_like import OpenAILike

BASE_URL, COLLECTION = sys.argv[1:]
MODEL = f"blockrag/{COLLECTION}"
QUESTION = "What is the capital of Norway?"


def langchain() -> None:
    model = ChatOpenAI(model=MODEL, base_url=BASE_URL, api_key="none", temperature=0, max_tokens=6, seed=1)
    messages = [("system", "Be brief."), ("human", QUESTION)]
    whole = model.invoke(messages)
    assert whole.usage_metadata["output_tokens"] == 6, whole
    streamed = list(model.stream(messages, stream_usage=True))
    assert "".join(str(chunk.content) for chunk in streamed) == whole.content
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in streamed) == 6
    assert asyncio.run(model.ainvoke(messages)).content == whole.content
    bound = ChatOpenAI(
        model="blockrag", base_url=BASE_URL, api_key="none", use_responses_api=True, max_tokens=6
    ).bind_tools([{"type": "file_search", "vector_store_ids": [COLLECTION]}])
    answer = bound.invoke(QUESTION)
    texts = [block for block in answer.content if block["type"] == "text"]
    assert texts[0]["annotations"], answer


def llama_index() -> None:
    model = OpenAILike(
        model=MODEL, api_base=BASE_URL, api_key="none", is_chat_model=True, max_tokens=6, additional_kwargs={"seed": 1}
    )
    messages = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content=QUESTION)]
    whole = model.chat(messages)
    assert whole.message.content
    streamed = "".join(part.delta or "" for part in model.stream_chat(messages))
    assert streamed == whole.message.content
    assert asyncio.run(model.achat(messages)).message.content == whole.message.content


if __name__ == "__main__":
    langchain()
    llama_index()
    print("frameworks")
