import re
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from align_cli.data.records import Message, Record, RowError
from align_cli.data.tokens import Template, Tokenised, identity
from align_cli.errors import UserError

ASKED = "hello there, how are you?"
DIALOGUE = (
    Message(role="user", content=ASKED),
    Message(role="assistant", content="I am fine.\nAnd you?"),
    Message(role="user", content="What is 3 + 4? \n"),
)
ANSWERS = ("It is 7.", "7", "I am fine. The cat sat on the mat,\n\nand é 猫 too.")

ATTACKS = [
    "</s>",
    "<s>",
    "<|im_end|>",
    "<|im_start|>system\n",
    "<|eot_id|>",
    "<",
    "|im_end|>",
    " ",
    "\n",
    "é",
    "猫",
    "a",
]
LETTERS = st.characters(exclude_categories=["Cs", "Co"])
TEXTS = st.lists(st.sampled_from(ATTACKS) | st.text(LETTERS, max_size=4), min_size=1, max_size=8).map("".join)
ANY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def record(prompt: str | tuple[Message, ...], *responses: str) -> Record:
    return Record(prompt, responses, tuple(float(k) for k in range(len(responses))), "rows.jsonl:1")


@dataclass(frozen=True)
class Written:
    """A `Tokenised` whose ids are lists."""

    prompt: list[int]
    responses: tuple[list[int], ...]


def tokenise(template: Template, one: Record) -> Written:
    [tokenised] = template.tokenise([one])
    assert isinstance(tokenised, Tokenised), tokenised
    assert {ids.dtype for ids in (tokenised.prompt, *tokenised.responses)} == {np.dtype(np.int32)}
    return Written(tokenised.prompt.tolist(), tuple(ids.tolist() for ids in tokenised.responses))


def chat(tokenizer: PreTrainedTokenizerBase, chat_template: str) -> Template:
    tokenizer.chat_template = chat_template
    return Template(tokenizer, template="chat", system=None)


def text(tokenizer: PreTrainedTokenizerBase) -> Template:
    return Template(tokenizer, template="text", system=None)


def own_ids(tokenizer: PreTrainedTokenizerBase, turns: list[Message], *, prompt: bool) -> list[int]:
    """What the tokenizer's own `apply_chat_template` gives, with the one begin-of-sequence token."""
    ids = tokenizer.apply_chat_template(
        [{"role": turn["role"], "content": turn["content"]} for turn in turns],
        add_generation_prompt=prompt,
        return_dict=False,
    )
    assert isinstance(ids, list)
    whole = [token for token in ids if isinstance(token, int)]
    return [begin(tokenizer), *whole] if puts_begin(tokenizer) and whole[0] != begin(tokenizer) else whole


def begin(tokenizer: PreTrainedTokenizerBase) -> int:
    assert isinstance(tokenizer.bos_token_id, int)
    return tokenizer.bos_token_id


def puts_begin(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def agrees_with_the_tokenizers_own(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    tokenised = tokenise(template, record(DIALOGUE, *ANSWERS))
    assert tokenised.prompt == own_ids(tokenizer, list(DIALOGUE), prompt=True)
    for answer, ids in zip(ANSWERS, tokenised.responses, strict=True):
        whole = own_ids(tokenizer, [*DIALOGUE, Message(role="assistant", content=answer)], prompt=False)
        ours = tokenised.prompt + ids
        assert ours == whole[: len(ours)]
        assert not set(whole[len(ours) :]) & set(tokenizer.all_special_ids)  # at most a line end is left


def test_clean_dialogues_get_the_ids_of_the_tokenizers_own_chat_template(
    tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> None:
    agrees_with_the_tokenizers_own(tokenizer, chat(tokenizer, chat_template))


def test_clean_dialogues_get_the_real_mistral_tokenizers_ids(
    mistral: PreTrainedTokenizerBase, chat_template: str
) -> None:
    if "<|" in chat_template and "eos_token" not in chat_template:
        pytest.skip("the template's delimiters are no tokens of Mistral's")
    agrees_with_the_tokenizers_own(mistral, chat(mistral, chat_template))


def test_mistral_gets_no_stray_space_behind_a_line_end(mistral: PreTrainedTokenizerBase) -> None:
    tokenised = tokenise(text(mistral), record("One line:\n", "hello", " hello"))
    assert [mistral.convert_ids_to_tokens(ids) for ids in tokenised.responses] == [
        ["hello", "</s>"],
        ["▁hell", "o", "</s>"],
    ]


def test_a_template_that_asks_for_a_system_message_gets_it(mistral: PreTrainedTokenizerBase) -> None:
    mistral.chat_template = (
        "{% if messages[0].role != 'system' %}{{ raise_exception('a system message is missing') }}{% endif %}"
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    with pytest.raises(UserError, match=r"a system message is missing\. data\.system gives a first message"):
        Template(mistral, template="chat", system=None)
    for system in ("Be brief.", ""):
        tokenised = tokenise(Template(mistral, template="chat", system=system), record("a", "b"))
        written = str(mistral.decode(tokenised.prompt + tokenised.responses[0]))
        assert "".join(written.split()) == "".join(f"[system]{system}</s>[user]a</s>[assistant]b</s>".split())


def test_mistral_reads_its_special_strings_in_a_text_as_text(mistral: PreTrainedTokenizerBase) -> None:
    tokenised = tokenise(text(mistral), record("say </s> and <s>", " </s>"))
    assert not {1, 2} & set(tokenised.prompt)
    assert tokenised.responses[0].count(2) == 1 and tokenised.responses[0][-1] == 2
    assert mistral.decode(tokenised.prompt + tokenised.responses[0]) == "say </s> and <s> </s></s>"


@ANY
@given(asked=TEXTS, answer=TEXTS)
@example(asked="</s><s>", answer="<|im_end|>\n<|im_start|>user")
def test_what_looks_like_a_special_token_in_a_text_stays_text(
    tokenizer: PreTrainedTokenizerBase, chat_template: str, asked: str, answer: str
) -> None:
    template = chat(tokenizer, chat_template)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    added = tokenizer.get_added_vocab()
    special = set(tokenizer.all_special_ids) | set(added.values())
    clean, tokenised = (
        tokenise(template, record(prompt, response)) for prompt, response in [("cat", "rat"), (asked, answer)]
    )
    assert [t for t in tokenised.prompt if t in special] == [t for t in clean.prompt if t in special]
    assert [t for t in tokenised.responses[0] if t in special] == [clean.responses[0][-1]]
    assert tokenised.responses[0][-1] == clean.responses[0][-1]


@ANY
@given(asked=TEXTS, answers=st.lists(TEXTS, min_size=2, max_size=3))
def test_a_response_has_the_same_ids_whatever_stands_beside_it(
    words: PreTrainedTokenizerBase, asked: str, answers: list[str]
) -> None:
    template = text(words)
    together = tokenise(template, record(asked, *answers))
    for answer, ids in zip(answers, together.responses, strict=True):
        assert tokenise(template, record(asked, answer)) == Written(together.prompt, (ids,))


@ANY
@given(asked=TEXTS, answer=TEXTS)
def test_ids_decode_to_the_texts_cut_at_the_border(words: PreTrainedTokenizerBase, asked: str, answer: str) -> None:
    tokenised = tokenise(text(words), record(asked, answer))
    assert words.decode(tokenised.prompt) == "<s>" + asked
    assert words.decode(tokenised.responses[0]) == answer + "</s>"


def test_a_token_that_reaches_across_the_border_is_cut(tokenizer: PreTrainedTokenizerBase) -> None:
    [whole] = tokenizer(["the cat"], add_special_tokens=False)["input_ids"]
    tokenised = tokenise(text(tokenizer), record("the c", "at"))
    [cut] = tokenised.responses
    assert (tokenised.prompt + cut)[-1 - len(whole) : -1] != whole  # else nothing reached across
    assert str(tokenizer.decode(tokenised.prompt)).removeprefix("<s>").lstrip() == "the c"
    assert tokenizer.decode(cut) == "at</s>"


def test_the_space_at_the_end_of_a_prompt_is_not_the_responses_too(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenised = tokenise(text(tokenizer), record("the ", "cat"))
    assert str(tokenizer.decode(tokenised.prompt)).endswith("the ")
    assert tokenizer.decode(tokenised.responses[0]) == "cat</s>"


def test_there_is_one_begin_of_sequence_token_if_the_tokenizer_puts_one(
    tokenizer: PreTrainedTokenizerBase, chat_template: str
) -> None:
    puts_one = puts_begin(tokenizer)
    writes_one = "bos_token" in chat_template
    tokenised = tokenise(chat(tokenizer, chat_template), record("cat", "rat"))
    assert tokenised.prompt.count(begin(tokenizer)) == (1 if puts_one or writes_one else 0)
    assert tokenise(text(tokenizer), record("cat", "rat")).prompt.count(begin(tokenizer)) == int(puts_one)


def test_a_template_that_strips_texts_is_followed(tokenizer: PreTrainedTokenizerBase) -> None:
    strip = "{% for m in messages %}<|im_start|>{{ m['content'] | trim }}<|im_end|>{% endfor %}" + (
        "{% if add_generation_prompt %}<|im_start|>{% endif %}"
    )
    template = chat(tokenizer, strip)
    spaced = tokenise(template, record(" cat ", "  rat\n"))
    assert spaced == tokenise(template, record("cat", "rat"))


def test_a_template_without_a_stop_token_gets_the_end_of_sequence_token(words: PreTrainedTokenizerBase) -> None:
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenised = tokenise(chat(words, plain), record("cat", "rat"))
    assert words.decode(tokenised.responses[0]) == "rat</s>"


def test_a_system_message_is_put_before_dialogues_without_one(words: PreTrainedTokenizerBase) -> None:
    words.chat_template = "{% for m in messages %}[{{ m['role'] + ' ' + m['content'] }}]{% endfor %}" + (
        "{% if add_generation_prompt %}[assistant {% endif %}"
    )
    template = Template(words, template="auto", system="be kind")
    own = (Message(role="system", content="be brief"), Message(role="user", content="cat"))
    assert words.decode(tokenise(template, record("cat", "rat")).prompt) == "<s>[system be kind][user cat][assistant "
    assert words.decode(tokenise(template, record(own, "rat")).prompt) == "<s>[system be brief][user cat][assistant "


def test_a_dialogue_under_the_text_template_is_written_as_in_hh(words: PreTrainedTokenizerBase) -> None:
    tokenised = tokenise(text(words), record((*DIALOGUE[:2], Message(role="user", content="Why?")), "Because."))
    assert words.decode(tokenised.prompt) == (
        f"<s>Human: {ASKED}\n\nAssistant: I am fine.\nAnd you?\n\nHuman: Why?\n\nAssistant:"
    )
    assert words.decode(tokenised.responses[0]) == " Because.</s>"


def test_a_prompt_that_is_no_prefix_is_refused_with_both_texts(words: PreTrainedTokenizerBase) -> None:
    words.chat_template = "{{ messages[-1]['content'] }}{% if add_generation_prompt %} answer: {% endif %}</s>"
    with pytest.raises(UserError, match=r"not the beginning.*answer:.*data\.template=text"):
        Template(words, template="auto", system=None)


def test_a_prompt_that_is_no_prefix_in_one_row_is_that_rows_error(words: PreTrainedTokenizerBase) -> None:
    counting = "{{ messages | length if messages[0]['content'] == 'cat' else '' }}" + (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    template = chat(words, counting)
    good, bad = template.tokenise([record("rat", "7"), record("cat", "7")])
    assert isinstance(good, Tokenised) and isinstance(bad, RowError)
    assert "not a prefix" in str(bad)


def test_a_dialogue_that_the_template_refuses_is_that_rows_error(words: PreTrainedTokenizerBase) -> None:
    refusing = "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + (
        "[{{ m['content'] }}]{% endfor %}"
    )
    system = (Message(role="system", content="be kind"), Message(role="user", content="cat"))
    [error] = chat(words, refusing).tokenise([record(system, "rat")])
    assert isinstance(error, RowError)
    assert re.search(r"refuses a dialogue of system, user: no system", str(error))


def test_private_use_characters_of_ours_are_refused(words: PreTrainedTokenizerBase) -> None:
    [error] = text(words).tokenise([record("cat \U00100001", "rat")])
    assert isinstance(error, RowError) and "U+100001" in str(error)


def test_a_shortened_prompt_keeps_its_begin_and_its_end(words: PreTrainedTokenizerBase) -> None:
    template = chat(
        words, "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    )
    prompt = tokenise(template, record("hello there, how are you?", "7")).prompt
    ids = np.array(prompt, dtype=np.int32)
    shorter = template.shortened(ids, len(prompt) - 2)
    assert shorter is not None and shorter.tolist() == prompt[:1] + prompt[3:]
    assert template.shortened(ids, 1 + template.header_tokens) is None


def test_a_shortened_prompt_keeps_the_begin_that_the_chat_template_alone_writes(words: PreTrainedTokenizerBase) -> None:
    assert isinstance(words, PreTrainedTokenizerFast)
    words.backend_tokenizer.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    template = chat(words, "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}")
    prompt = tokenise(template, record("hello there, how are you?", "7")).prompt
    assert template.bos is None and prompt.count(begin(words)) == 1 and prompt[0] == begin(words)
    shorter = template.shortened(np.array(prompt, dtype=np.int32), len(prompt) - 2)
    assert shorter is not None and shorter.tolist() == prompt[:1] + prompt[3:]


def test_a_template_that_writes_the_date_writes_the_same_one_every_day(words: PreTrainedTokenizerBase) -> None:
    body = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    today = "{% if strftime_now is defined %}{% set day = strftime_now('%d %b %Y') %}{% endif %}{{ day }}"
    fixed = chat(words, "26 Jul 2024" + body)
    assert tokenise(chat(words, today + body), record("cat", "rat")) == tokenise(fixed, record("cat", "rat"))
    with pytest.raises(UserError, match="strftime_now, without a quoted format"):
        chat(words, "{% set format = '%Y' %}{{ strftime_now(format) }}" + body)


def test_a_chat_template_is_needed_for_template_chat(words: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"data\.template=text"):
        Template(words, template="chat", system=None)


def test_the_identity_of_a_tokenizer_changes_with_its_chat_template(words: PreTrainedTokenizerBase) -> None:
    before = identity(words)
    words.chat_template = "{{ messages }}"
    assert identity(words) != before
