"""OpenAI's own package against a running system: ``openai_client.py BASE_URL COLLECTION``, which it fills itself.

Run by tests/integration/test_http.py with an interpreter that has nothing of ours.
"""

from __future__ import annotations

import asyncio
import sys

import openai

BASE_URL, COLLECTION = sys.argv[1:]
MODEL = f"blockrag/{COLLECTION}"
TEXTS = {
    "norway.txt": "Norway is a country in northern Europe. The capital of Norway is Oslo.",
    "peru.txt": "Peru is a country in South America. The capital of Peru is Lima.",
}
QUESTION = [{"role": "user", "content": "What is the capital of Norway?"}]


def documents(client: openai.OpenAI) -> None:
    for name, text in TEXTS.items():
        form = {"blockrag": {"collection": COLLECTION}}
        stored = client.files.create(file=(name, text.encode()), purpose="assistants", extra_body=form)
        assert stored.id == f"{COLLECTION}/{name}", stored
        attached = client.vector_stores.files.create(COLLECTION, file_id=stored.id)
        assert attached.status == "completed"
    assert client.files.retrieve(f"{COLLECTION}/peru.txt").filename == "peru.txt"
    listed = [file.id for file in client.vector_stores.files.list(COLLECTION, limit=1)]
    assert listed == [f"{COLLECTION}/{name}" for name in sorted(TEXTS)], listed
    assert {file.id for file in client.files.list(limit=1)} >= set(listed)
    assert MODEL in {model.id for model in client.models.list()}
    found = client.vector_stores.search(COLLECTION, query="capital of Norway", max_num_results=1)
    (best,) = found.data
    assert (best.filename, best.content[0].type) == ("norway.txt", "text")


def chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=6, seed=1)
    assert answer.usage is not None and answer.usage.completion_tokens == 6
    assert answer.choices[0].finish_reason == "length"
    streamed = client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=6, seed=1, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(streamed)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == answer.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens > 0, usage
    turns = [*QUESTION, {"role": "assistant", "content": text}, {"role": "user", "content": "And of Peru?"}]
    for _ in range(2):
        longer = client.chat.completions.create(model=MODEL, messages=turns, max_tokens=2)
        assert longer.usage is not None and longer.usage.prompt_tokens_details is not None
    # what was said before is a block like a passage: the second time only the question is computed
    details = longer.model_extra["blockrag"]["usage"]
    assert details["encoded_tokens"] == 0, details
    assert longer.usage.prompt_tokens_details.cached_tokens == longer.usage.prompt_tokens - details["prefill_tokens"]


def responses(client: openai.OpenAI) -> None:
    tool = {"type": "file_search", "vector_store_ids": [COLLECTION], "max_num_results": 2}
    whole = client.responses.create(
        model="blockrag",
        input="What is the capital of Norway?",
        tools=[tool],
        include=["file_search_call.results"],
        max_output_tokens=6,
    )
    search, message = whole.output
    assert search.type == "file_search_call" and search.results
    assert search.results[0].filename == "norway.txt"
    (part,) = message.content
    assert {note.file_id for note in part.annotations} == {f"{COLLECTION}/{name}" for name in TEXTS}
    assert {note.type for note in part.annotations} == {"file_citation"}
    with client.responses.stream(model=MODEL, input="What is the capital of Norway?", max_output_tokens=6) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and "response.file_search_call.completed" in kinds
    # six tokens do not end what a random model says
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert events[-1].response.output_text == whole.output_text


def errors(client: openai.OpenAI) -> None:
    for kind, fields in (
        (openai.NotFoundError, {"model": "gpt-4o"}),
        (openai.NotFoundError, {"model": "blockrag/no-such-collection"}),
        (openai.BadRequestError, {"n": 2}),
        (openai.BadRequestError, {"logprobs": True}),
        (openai.BadRequestError, {"max_tokens": 90_000}),
    ):
        try:
            client.chat.completions.create(**{"model": MODEL, "messages": QUESTION, **fields})
        except kind as error:
            assert error.body and error.body["message"], error
        else:
            raise AssertionError(fields)


async def concurrently() -> None:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key="none") as client:
        asked = [client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4) for _ in range(8)]
        answers = await asyncio.gather(*asked)
        assert len({answer.choices[0].message.content for answer in answers}) == 1
        stream = await client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2000, stream=True)
        async for _ in stream:
            break
        await stream.close()


def main() -> None:
    client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0)
    documents(client)
    chat(client)
    responses(client)
    errors(client)
    asyncio.run(concurrently())
    for name in TEXTS:
        assert client.files.delete(f"{COLLECTION}/{name}").deleted
    print("openai", openai.__version__)


if __name__ == "__main__":
    main()
