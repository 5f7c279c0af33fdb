"""Atheris (libFuzzer) on what reads other people's bytes: the parsers of documents, and the composition of prompts.

``python -m tests.system.fuzz parsers --seconds 60`` fuzzes for so long and exits with 0 when it found nothing; what it
found is written into the folder given by ``--found``.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import atheris

_READERS = ("blockrag.ingest", "blockrag.characters", "pypdf", "markdown_it")
_PROMPTS = (
    "blockrag.decoder.prompt",
    "blockrag.modeling.template",
    "blockrag.modeling.running_text",
    "blockrag.budget",
)
with atheris.instrument_imports(include=[*_READERS, *_PROMPTS]):
    from blockrag.decoder.prompt import read_prompt
    from blockrag.errors import InvalidRequestError
    from blockrag.ingest.media import MediaType
    from blockrag.ingest.parsing import parse
    from blockrag.keys import KeyMaker
    from blockrag.v1 import common_pb2, decoder_pb2
    from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

_TYPES = tuple(MediaType)
_CHUNK_TOKENS = 4
_SEEDS = (
    b"<html><head><title>T</title></head><body><h1>A</h1><p>b <b>c</b><table><tr><td>1</table><svg><p>&amp;&#0;",
    b"---\ntitle: T\nyear: 1999\n---\n# A\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\nx\n```\n[l](u) ![i](u)\n",
    b'{"id": "a", "text": "b", "metadata": {"x": [1, null]}}\n{"id": "c", "text": "d"}\n',
    b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj\n2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj\n"
    b"3 0 obj<</Type/Page/Parent 2 0 R/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>endobj\n"
    b"4 0 obj<</Length 33>>stream\nBT /F 12 Tf 9 9 Td (Hello) Tj ET\nendstream endobj\n"
    b"5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF",
    "plain text, \u00e9\u4e2d\U0001f600\r\nsecond-\nline".encode(),
)


def read_file(data: bytes) -> None:
    """A file is read, or refused; nothing else."""
    if not data:
        return
    target = io.BytesIO()
    try:
        parse(io.BytesIO(data[1:]), target, _TYPES[data[0] % len(_TYPES)], {})
    except InvalidRequestError:
        return
    target.getvalue().decode("utf-8")


def prompts() -> Callable[[bytes], None]:
    """What users type opens no turn, and what a decoder is asked for adds up."""
    tokenizer = make_tiny_tokenizer()
    special = set(tokenizer.all_special_ids)
    empty = {
        "passage": sum(each in special for each in TEST_TEMPLATE.passage_ids(tokenizer, "a", "b")),
        "final": sum(each in special for each in TEST_TEMPLATE.final_ids(tokenizer, "a")),
    }
    keys = KeyMaker("0" * 64, b"a secret of sixteen and more", "1" * 64)

    def one(data: bytes) -> None:
        drawn = atheris.FuzzedDataProvider(data)
        title, text, question = (drawn.ConsumeUnicodeNoSurrogates(200) for _ in range(3))
        passage = TEST_TEMPLATE.passage_ids(tokenizer, title, text)
        final = TEST_TEMPLATE.final_ids(tokenizer, question)
        if sum(each in special for each in passage) != empty["passage"]:
            raise AssertionError("a passage holds a special token")
        if sum(each in special for each in final) != empty["final"]:
            raise AssertionError("a question holds a special token")
        fitting = drawn.ConsumeBool()
        chunks = -(-len(passage) // _CHUNK_TOKENS) if fitting else drawn.ConsumeIntInRange(0, 60)
        forms = [drawn.ConsumeIntInRange(1, 2 if fitting else 4) for _ in range(chunks)]
        chunk_tokens = _CHUNK_TOKENS if fitting else drawn.ConsumeIntInRange(0, 5)
        block = common_pb2.PromptBlock(token_ids=passage, forms=forms, chunk_tokens=chunk_tokens)
        request = decoder_pb2.DecodeRequest(
            blocks=[block] * drawn.ConsumeIntInRange(0, 3),
            final_token_ids=final,
            sampling=common_pb2.Sampling(max_tokens=4),
            attention_mode=drawn.ConsumeIntInRange(0, 4),
        )
        request.context.tenant = "public"
        try:
            prompt = read_prompt(request, keys, len(tokenizer), _CHUNK_TOKENS)
        except InvalidRequestError:
            return
        if prompt.slots != prompt.composed_slots + len(prompt.token_ids):
            raise AssertionError("slots do not add up")

    return one


def main() -> None:
    """In a child, since libFuzzer ends its process, and what it was given to begin with is to go."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", choices=("parsers", "prompts"))
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--found", default=".", help="folder for what it found")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="blockrag-fuzz-") as folder:
        child = os.fork()
        if not child:
            fuzz(options, Path(folder))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if status >= 0 else 1)


def fuzz(options: argparse.Namespace, corpus: Path) -> NoReturn:
    """``corpus``: a folder for the inputs to begin with, and for those that it keeps."""
    for number, seed in enumerate(_SEEDS if options.target == "parsers" else ()):
        for kind in range(len(_TYPES)):
            (corpus / f"{number}-{kind}").write_bytes(bytes([kind]) + seed)
    texts = b"Norway <|passage|> <|end|> text and a title, then a question of some length" * 4
    (corpus / "texts").write_bytes(texts + bytes(range(64)))
    flags = {
        "max_total_time": options.seconds,
        "seed": options.seed,
        "max_len": 4096,
        "len_control": 0,  # long inputs from the beginning
        "timeout": 30,
        "rss_limit_mb": 2500,
        "artifact_prefix": f"{options.found}/",
        "print_final_stats": 1,
    }
    arguments = [sys.argv[0], *(f"-{name}={value}" for name, value in flags.items()), str(corpus)]
    atheris.Setup(arguments, read_file if options.target == "parsers" else prompts())
    atheris.Fuzz()
    sys.exit(0)


if __name__ == "__main__":
    main()
