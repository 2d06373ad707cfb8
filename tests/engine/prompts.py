"""Twenty prompts of 40 to 3,000 tokens: manuals, unicode, conversations that grow."""

import pydoc_data.topics

from tests.engine.rig import Worker

LENGTHS = (40, 129, 255, 256, 257, 300, 384, 420, 512, 513, 640, 777, 900, 1100, 1500, 3000)
_UNICODE = "Grüße aus Łódź: 日本語, русский текст, العربية, 🙂👩‍👩‍👧‍👦 — " * 12


def prompts(worker: Worker) -> list[list[int]]:
    """Token ids; different texts throughout, except that conversations repeat their own beginnings."""
    manual = worker.tokens("\n".join(pydoc_data.topics.topics.values())[:80_000])
    made, at = [], 0
    for length in LENGTHS:
        made.append(manual[at : at + length])
        at += length
    made.append(worker.tokens(_UNICODE))
    return made + conversation(worker, 3)


def conversation(worker: Worker, turns: int) -> list[list[int]]:
    """A chat as its client sends it turn by turn: each prompt begins with the one before."""
    topics = list(pydoc_data.topics.topics.values())
    messages = [{"role": "system", "content": "You explain Python to beginners. " + topics[3][:1200]}]
    seen = []
    for turn in range(turns):
        messages.append(
            {"role": "user", "content": f"Question {turn}: what does this mean? {topics[turn + 9][:700]}"}
        )
        seen.append(worker.chat_tokens(messages=messages))
        messages.append(
            {"role": "assistant", "content": f"It means the following. {topics[turn + 20][:400]}"}
        )
    return seen
