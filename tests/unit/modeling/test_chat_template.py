from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from blockrag.errors import BundleError
from blockrag.modeling.chat_template import INSTRUCTION, REFUSAL, default_template, read_template
from tests.models import TEST_TEMPLATE, make_tiny_tokenizer

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def chat_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tiny_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = chat_template
    return tokenizer


def test_plain_checkpoints_get_a_plain_template_with_tokens_of_their_own() -> None:
    tokenizer = make_tiny_tokenizer()

    template = default_template(tokenizer)

    assert template.instruction == INSTRUCTION  # this tokenizer adds no BOS by itself
    assert template.end == "<|end|>"
    assert template.refusal == REFUSAL
    assert REFUSAL in template.instruction
    assert tokenizer.decode(template.answer_ids(tokenizer, "blue")) == " blue<|end|>"
    assert tokenizer.decode(template.final_ids(tokenizer, "Why?")) == "Question: Why?\nAnswer:"


def test_bos_opens_the_instruction_alone_where_the_tokenizer_puts_it() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 1)]
    )

    template = default_template(tokenizer)

    assert template.instruction_ids(tokenizer)[0] == tokenizer.bos_token_id
    assert template.instruction_ids(tokenizer).count(1) == 1
    assert 1 not in template.passage_ids(tokenizer, "title", "text")
    assert 1 not in template.final_ids(tokenizer, "question")


def test_a_chat_keeps_its_turns_and_passages_stand_inside_the_users() -> None:
    tokenizer = chat_tokenizer(CHATML)

    template = default_template(tokenizer)

    assert template.instruction == "<|im_start|>user\n" + INSTRUCTION
    assert "<|im_" not in template.passage
    assert template.final == "Question: {question}<|im_end|>\n<|im_start|>assistant\n"
    assert (template.answer_prefix, template.end) == ("", "<|im_end|>")
    asked = template.instruction + template.passage.format(title="T", text="x") + template.final.format(question="Q")
    content = INSTRUCTION + "Title: T\nx\n\nQuestion: Q"
    messages = [{"role": "user", "content": content}]
    assert asked == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_a_chat_with_bos_and_a_space_before_the_answer() -> None:
    template = default_template(chat_tokenizer(INST))

    assert template.instruction == "<|begin|>[INST] " + INSTRUCTION
    assert template.final == "Question: {question} [/INST]"
    assert (template.answer_prefix, template.end) == (" ", "<|end|>")


def test_a_model_that_thinks_is_told_not_to() -> None:
    assert default_template(chat_tokenizer(THINKING)).final.endswith("<think>\n\n</think>\n\n")


def test_chat_templates_that_fail_or_show_nothing() -> None:
    with pytest.raises(BundleError, match=r"fails: boom; give a template file"):
        default_template(chat_tokenizer("{{ raise_exception('boom') }}"))
    with pytest.raises(BundleError, match="no turns to put passages into"):
        default_template(chat_tokenizer("nothing of the messages"))


def test_a_tokenizer_without_an_end_needs_a_file() -> None:
    tokenizer = make_tiny_tokenizer()
    tokenizer.eos_token = None

    with pytest.raises(BundleError, match="names no eos_token"):
        default_template(tokenizer)


def test_a_template_file(tmp_path: Path) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps(TEST_TEMPLATE.to_dict()), encoding="utf-8")

    assert read_template(path) == TEST_TEMPLATE


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"end": None}, "template texts must be strings"),
        ({"passage": "no field"}, r"template.passage lacks \{text\}"),
        ({"final": "no field"}, r"template.final lacks \{question\}"),
        ({"other": "x"}, "wrong keys: other"),
    ],
)
def test_a_bad_template_file(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    path = tmp_path / "template.json"
    path.write_text(json.dumps({**TEST_TEMPLATE.to_dict(), **change}), encoding="utf-8")

    with pytest.raises(BundleError, match=rf"template\.json: .*{problem}"):
        read_template(path)


def test_a_template_file_that_is_no_json(tmp_path: Path) -> None:
    (tmp_path / "template.json").write_text("{", encoding="utf-8")

    with pytest.raises(BundleError, match=r"template\.json"):
        read_template(tmp_path / "template.json")
    with pytest.raises(BundleError, match=r"absent\.json"):
        read_template(tmp_path / "absent.json")


DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n"
) + CHATML


def test_a_chat_template_with_a_date_for_who_knows_none_says_that_one() -> None:
    """B9 of the cases: a template that calls strftime_now makes the same instruction on every day."""
    template = default_template(chat_tokenizer(DATED))
    assert template.instruction.startswith("<|im_start|>system\nToday: 26 Jul 2024<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(
    ("form", "written"),
    [("%d %b %Y", "01 Jan 2025"), ("%A", "Wednesday"), ("%H:%M", "00:00"), ("%y", "25"), ("%-m", "1")],
)
def test_a_chat_template_that_always_writes_the_date_says_the_same_every_day(form: str, written: str) -> None:
    """B9 of the cases, for a template without a date of its own."""
    text = "<|im_start|>system\nToday: {{ strftime_now('" + form + "') }}<|im_end|>\n" + CHATML
    assert default_template(chat_tokenizer(text)).instruction.startswith(
        f"<|im_start|>system\nToday: {written}<|im_end|>"
    )


def test_a_chat_template_that_only_looks_at_the_date_is_not() -> None:
    template = default_template(chat_tokenizer("{% set year = strftime_now('%Y') %}" + CHATML))
    assert template == default_template(chat_tokenizer(CHATML))


@pytest.mark.parametrize(
    "form",
    [
        CHATML,
        INST,
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}" + CHATML,
    ],
)
def test_a_conversation_reads_as_the_checkpoint_s_own(form: str) -> None:
    tokenizer = chat_tokenizer(form)
    template = default_template(tokenizer)

    blocks = [
        template.instruction_ids(tokenizer),
        template.turn_ids(tokenizer, "Where?", "In Oslo"),
        template.turn_ids(tokenizer, "Why?", "Nobody knows"),
        template.final_ids(tokenizer, "When?"),
    ]

    messages = [
        {"role": "user", "content": INSTRUCTION + "Question: Where?"},
        {"role": "assistant", "content": "In Oslo"},
        {"role": "user", "content": "Question: Why?"},
        {"role": "assistant", "content": "Nobody knows"},
        {"role": "user", "content": "Question: When?"},
    ]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    joined = "".join(tokenizer.decode(ids) for ids in blocks)
    # INST's answers end with a token and no line break, and whoever tokenises a chat adds BOS
    assert joined.removeprefix("<|begin|>") == str(whole).removeprefix("<|begin|>")


def test_templates_without_turns_put_question_after_answer() -> None:
    assert TEST_TEMPLATE.next_turn == ""
    assert default_template(make_tiny_tokenizer()).next_turn == ""


@pytest.mark.parametrize(
    "begin", ["<s>", "<bos>", "<|begin_of_text|>", "<BOS_TOKEN>", "<｜begin▁of▁sentence｜>", "[gMASK]<sop>"]
)
def test_a_sequence_begins_once_whatever_its_beginning_is_called(begin: str) -> None:
    template = replace(
        TEST_TEMPLATE,
        instruction=f"{begin}<|user|>{INSTRUCTION}",
        final="Question: {question}<|assistant|>",
        end="<end>",
    )
    assert template.next_turn == "<|user|>"


def test_what_was_said_before_is_data() -> None:
    tokenizer = make_tiny_tokenizer()
    end = tokenizer.eos_token_id

    ids = TEST_TEMPLATE.turn_ids(tokenizer, "a<|end|>b", "c<|end|>d") + TEST_TEMPLATE.request_ids(tokenizer, "<|end|>")

    assert ids.count(end) == 1  # the one that ends the answer
