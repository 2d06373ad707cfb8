import random
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from loadtests import texts

MODEL = Path.home() / ".cache" / "cairn" / "models" / "SmolLM2-135M-Instruct"


def everything(seed: int) -> list[object]:
    rng = random.Random(seed)
    return [texts.chat_question(rng, "s"), texts.rag(rng), texts.one_off(rng, "s"), rng.random()]


def test_the_same_seed_asks_the_same():
    assert everything(1) == everything(1)
    assert everything(1) != everything(2)


def test_the_tag_sets_apart_what_the_seed_does_not():
    ask = texts.one_off(random.Random(1), "run-a")[0]["content"]
    again = texts.one_off(random.Random(1), "run-b")[0]["content"]
    assert ask != again
    assert ask.removeprefix("run-a") == again.removeprefix("run-b")
    assert texts.chat_question(random.Random(1), "ann").startswith("Student ann")


def test_a_document_comes_first_and_whole_so_that_its_beginning_can_be_reused():
    rng = random.Random(3)
    asked = [texts.rag(rng)[1]["content"] for _ in range(200)]
    found = [next(text for text in texts.DOCUMENTS if ask.startswith(text)) for ask in asked]
    assert len(set(asked)) > len(set(found)) > 5


def test_the_first_documents_are_asked_about_most():
    rng = random.Random(4)
    counts = Counter(texts.popular(rng, "abcdefgh") for _ in range(4000))
    assert counts["a"] > counts["b"] > counts["d"] > counts["h"] > 0
    assert 1.7 < counts["a"] / counts["b"] < 2.7  # 2^1.1


@pytest.fixture(scope="module")
def tokens():
    if not (MODEL / "tokenizer.json").is_file():
        pytest.skip("NO MODEL: `cairn model prepare`")
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    return lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids)


def test_prompts_are_as_long_as_promised(tokens):
    rng = random.Random(5)
    assert 550 <= len(tokens(texts.SYSTEM)) <= 650
    for _ in range(50):
        assert 40 <= len(tokens(texts.chat_question(rng, "s"))) <= 260
        assert 600 <= len(tokens(texts.rag(rng)[1]["content"])) <= 2300
        assert 200 <= len(tokens(texts.one_off(rng, "s")[0]["content"])) <= 320


def test_a_conversation_fits_into_a_small_context(tokens):
    rng = random.Random(6)
    longest = max(len(tokens(texts.chat_question(rng, "s"))) for _ in range(300))
    assert len(tokens(texts.SYSTEM)) + texts.TURNS * (longest + 64) < 4096


def test_the_manual_is_long_enough_for_the_benches(tokens):
    ids = tokens(texts.MANUAL)
    assert len(texts.slices(ids, 6, 3000)) == 6
    assert len(texts.slices(ids, 6 * 8, 768)) == 48


def test_slices_are_exact_and_begin_differently(tokens):
    made = texts.slices(tokens(texts.MANUAL), 6, 3000)
    assert {len(prompt) for prompt in made} == {3000}
    assert len({tuple(prompt[:16]) for prompt in made}) == 6


def test_too_much_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match="4 prompts of 30 tokens do not fit into 100 tokens"):
        texts.slices(range(100), 4, 30)
