"""Messages of a conversation → its last question, the turns before it, and what the caller asks of every answer.

The rule, the same for both APIs: the last message must be the user's, and its text is the question and what is searched
for; nothing of the turns before is. System and developer messages are put together and stand before the first turn.
Messages of one side that follow each other are one, with an empty line between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from blockrag.errors import InvalidRequestError
from blockrag.v1 import rag_pb2

_BETWEEN = "\n\n"
INSTRUCTING = ("system", "developer")


@dataclass(frozen=True)
class Said:
    """One message."""

    role: str
    """system, developer, user or assistant."""
    text: str


def put_conversation(said: Sequence[Said], request: rag_pb2.GenerateRequest, param: str) -> None:
    """Fills question, turns and instructions of ``request``.

    Raises ``InvalidRequestError`` naming ``param`` when nobody asks, or an answer has no question.
    """
    request.instructions = _BETWEEN.join(one.text for one in said if one.role in INSTRUCTING)
    turns: list[Said] = []
    for one in (one for one in said if one.role not in INSTRUCTING):
        if turns and turns[-1].role == one.role:
            turns[-1] = Said(one.role, turns[-1].text + _BETWEEN + one.text)
        else:
            turns.append(one)
    if not turns or turns[-1].role != "user":
        raise InvalidRequestError(param, "must end with a message of the user: that is the question")
    if turns[0].role != "user":
        raise InvalidRequestError(param, "a message of the assistant must have one of the user before it")
    *before, last = turns
    request.question = last.text
    for question, answer in zip(before[::2], before[1::2], strict=True):
        request.turns.add(question=question.text, answer=answer.text)
