"""Prompts made of Python's own manual (pydoc_data.topics): same seed, same prompts, nothing to download."""

import pydoc_data.topics
import random
from collections.abc import Sequence

Message = dict[str, str]

TOPICS = tuple(text for _, text in sorted(pydoc_data.topics.topics.items()))
MANUAL = "\n".join(TOPICS)
DOCUMENTS = tuple(text for text in TOPICS if 2_500 <= len(text) <= 9_000)  # about 700 to 2,000 tokens
WORDS = tuple(sorted({word for word in MANUAL.split() if word.isalpha() and len(word) > 2}))
TURNS = 6  # of a conversation, before a user starts another: about 1,700 tokens

SYSTEM = (  # about 600 tokens, shared by every conversation
    "You are the help desk of a Python course. Answer in one short paragraph, for beginners, and stay with "
    "what the house rules below say about the language.\n\n" + MANUAL[10_000:12_650]
)
_RAG_SYSTEM = "Answer the question from the document. If it is not in there, say so."
_QUESTIONS = (
    "What does it say about {}?",
    "Explain {} in your own words.",
    "Give a short example of {}.",
    "When would one not use {}?",
    "What happens at run time with {}?",
    "Which error is raised around {}, and why?",
)


def chat_question(rng: random.Random, tag: str) -> str:
    """A question about an excerpt of some hundred characters.  `tag` sets the conversation apart."""
    text = rng.choice(TOPICS)
    at = rng.randrange(max(1, len(text) - 400))
    return f"Student {tag}: {_question(rng, text)} The book says: {text[at : at + 400]}"


def rag(rng: random.Random) -> list[Message]:
    """Document first, question last; some documents are asked about far more often than others."""
    document = popular(rng, DOCUMENTS)
    question = _question(rng, document)
    return [
        {"role": "system", "content": _RAG_SYSTEM},
        {"role": "user", "content": f"{document}\n\n{question}"},
    ]


def one_off(rng: random.Random, tag: str, words: int = 200) -> list[Message]:
    """Nobody asked this before and nobody will again, if `tag` is new."""
    text = " ".join(rng.choices(WORDS, k=words))
    return [{"role": "user", "content": f"{tag} {text}. What is this about?"}]


def popular(rng: random.Random, items: Sequence[str], exponent: float = 1.1) -> str:
    """Zipf: the n-th item is chosen n^exponent times less often than the first."""
    return rng.choices(items, [(rank + 1) ** -exponent for rank in range(len(items))])[0]


def slices(ids: Sequence[int], count: int, tokens: int, start: int = 0) -> list[list[int]]:
    """`count` prompts of exactly `tokens` token ids from `start` on; no two share their beginning.

    Raises ValueError when the text is too short for that.
    """
    if start + count * tokens > len(ids):
        raise ValueError(f"{count} prompts of {tokens} tokens do not fit into {len(ids) - start:,} tokens")
    return [list(ids[at : at + tokens]) for at in range(start, start + count * tokens, tokens)]


def _question(rng: random.Random, text: str) -> str:
    return rng.choice(_QUESTIONS).format(f"“{rng.choice(text.split())}”")
