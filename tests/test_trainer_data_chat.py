"""`data=chat`: which tokens of a conversation are learned, over the templates of real models, beside transformers; files of every
form; and what is no conversation, named with file and line."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from chat_templates import CHATML, QWEN3, SHAPES, Shape
from rowwise.trainer.data.chat.forms import BadRow, conversation_of
from rowwise.trainer.data.chat.renderer import Renderer, Said, Template
from rowwise.trainer.data.chat.tokenizer import ChatTokenizer, open_chat_tokenizer

TEXT = "What is the capital of France? It is Paris, of course. Thank you, and of Spain? Madrid; 行 é 🙂 user assistant "
TURNS = [
    ("user", "What is the capital of France?"), ("assistant", "It is Paris, é and 🙂."), ("user", "Thank you, and of Spain?\n"),
    ("assistant", "Madrid;\n\n行 of course"),
]  # fmt: skip


def messages(*turns: tuple[str, str]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def write_folder(folder: Path, shape: Shape, source: str | None = None, trim: bool = False) -> Path:
    """A tokenizer like GPT-2's with the special tokens of a model, and its template beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder, library.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=trim)
    trainer = trainers.BpeTrainer(
        vocab_size=290, special_tokens=list(shape.special), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([TEXT], trainer)
    library.save(str(folder / "tokenizer.json"))
    named = {name: token for name, token in (("bos_token", shape.bos), ("eos_token", shape.eos)) if token}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | {"chat_template": "{{ 'not this' }}"}))
    (folder / "chat_template.jinja").write_text(shape.source if source is None else source)
    return folder


CONVERSATIONS = [
    messages(*TURNS),
    messages(("system", "Be brief. "), *TURNS),
    messages(*TURNS[:2]),
    messages(*TURNS[:3]),
    messages(("user", "a\n"), ("assistant", " Paris \n"), ("user", "<s> </s>"), ("assistant", "It is of, of course.")),
]


def ours(tokenizer: ChatTokenizer, conversations: list, renderer: Renderer) -> list[tuple[list[int], list[int]]]:
    said = renderer.conversations([conversation_of({"messages": one}) for one in conversations])
    assert all(isinstance(one, Said) for one in said), said
    encoded = tokenizer.encode_learned([one.text for one in said], [one.spans for one in said])
    return [(ids, learned.tolist()) for ids, learned in encoded]


@pytest.mark.parametrize("name", SHAPES)
def test_masks_are_those_of_transformers_with_and_without_marks(tmp_path, name):
    """Token for token; what is learned decodes to what the assistant says, and the token that ends it."""
    from transformers import PreTrainedTokenizerFast

    shape = SHAPES[name]
    folder = write_folder(tmp_path / "marked", shape)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"),
        **{key: token for key, token in (("bos_token", shape.bos), ("eos_token", shape.eos)) if token},
    )
    conversations = [one for one in CONVERSATIONS if shape.system or one[0]["role"] != "system"]
    if name == "Qwen3":
        conversations.append(
            messages(*TURNS[:3], ("assistant", "<think>\nof Spain\n</think>\n\nMadrid"))
            + messages(("user", "And France?"))
        )
        conversations.append(messages(*TURNS[:3], ("assistant", "<think>\nof Spain\n</think>\n\nMadrid")))
    expected = [
        theirs.apply_chat_template(
            one, chat_template=shape.source, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        for one in conversations
    ]
    write_folder(tmp_path / "unmarked", shape, shape.unmarked)
    for marked in ("marked", "unmarked"):
        tokenizer = open_chat_tokenizer(str(tmp_path / marked), None, {})
        with Renderer(tokenizer.template) as renderer:
            assert renderer.marked == (marked == "marked")
            found = ours(tokenizer, conversations, renderer)
        for one, (ids, learned), their in zip(conversations, found, expected, strict=True):
            assert (ids, learned) == (their["input_ids"], their["assistant_masks"]), (marked, one)
            assert 0 < sum(learned) < len(learned)
            said = tokenizer.decode([token for token, is_learned in zip(ids, learned, strict=True) if is_learned])
            for message in one:
                content = message["content"].split("</think>")[-1].strip()
                assert (content in said) == (message["role"] == "assistant" or content == "a")


def test_spaces_that_a_tokenizer_cuts_off_its_offsets_are_learned(tmp_path):
    """transformers loses the mask where a span begins with one."""
    conversation = [messages(("user", "of"), ("assistant", " of course")) * 2]
    found = []
    for trim in (False, True):
        tokenizer = open_chat_tokenizer(str(write_folder(tmp_path / str(trim), CHATML, trim=trim)), None, {})
        with Renderer(tokenizer.template) as renderer:
            found += ours(tokenizer, conversation, renderer)
    assert found[0] == found[1] and tokenizer.decode(found[1][0][:3]) and sum(found[1][1]) > 4


def test_a_character_of_several_tokens_is_learned_whole(tmp_path):
    tokenizer = open_chat_tokenizer(str(write_folder(tmp_path, CHATML)), None, {})
    ((ids, learned),) = tokenizer.encode_learned(["a\N{LATIN SMALL LETTER THORN}b"], [[(1, 2)]])
    assert len(ids) == 4 and learned.tolist() == [0, 1, 1, 0]


SPELT = {
    "messages": {"messages": messages(*TURNS[:2])},
    "as JSON in a text": {"messages": json.dumps(messages(*TURNS[:2]))},
    "parts": {"messages": [{"role": r, "content": [{"type": "text", "text": t[:5]}, {"text": t[5:]}]} for r, t in TURNS[:2]]},
    "ShareGPT": {"conversations": [{"from": {"user": "human", "assistant": "gpt"}[r], "value": t} for r, t in TURNS[:2]]},
    "roles under its key": {"conversations": messages(*TURNS[:2])},
    "prompt and completion": {"prompt": TURNS[0][1], "completion": TURNS[1][1]},
    "lists of both": {"prompt": messages(TURNS[0]), "completion": messages(TURNS[1])},
    "Alpaca": {"instruction": TURNS[0][1], "input": "", "output": TURNS[1][1]},
}  # fmt: skip


@pytest.mark.parametrize("name", SPELT)
def test_rows_of_every_form_are_the_same_conversation(name):
    found = conversation_of(SPELT[name])
    assert found.messages == messages(*TURNS[:2]) and found.learned == (1,)


def test_what_stands_beside_a_conversation_is_read():
    row = {
        "instruction": "a", "input": "b", "output": "c", "system": "s", "history": json.dumps([["x", "y"]]),
        "tools": '[{"name": "f"}]',
    }  # fmt: skip
    found = conversation_of(row)
    assert found.messages == messages(
        ("system", "s"), ("user", "x"), ("assistant", "y"), ("user", "a\n\nb"), ("assistant", "c")
    )
    assert found.learned == (2, 4) and found.tools == [{"name": "f"}]
    in_prompt = conversation_of({"prompt": messages(*TURNS[:3]), "completion": "Madrid"})
    assert in_prompt.learned == (3,), "what a prompt says is not learned"
    weighed = messages(*TURNS)
    weighed[1]["weight"] = 0
    assert conversation_of({"messages": weighed}).learned == (3,)
    thought = conversation_of({"messages": messages(TURNS[0], ("assistant", "x")), "more": 1}).messages
    assert thought == messages(TURNS[0], ("assistant", "x"))


@pytest.mark.parametrize("shape", ["marked", "unmarked"])
def test_what_is_not_to_be_learned_is_not(tmp_path, shape):
    """The tokens of all turns less those of the one whose weight is 0."""
    source = CHATML.source if shape == "marked" else CHATML.unmarked
    tokenizer = open_chat_tokenizer(str(write_folder(tmp_path, CHATML, source)), None, {})
    weighed = messages(*TURNS)
    weighed[1]["weight"] = 0
    with Renderer(tokenizer.template) as renderer:
        (whole, part) = ours(tokenizer, [messages(*TURNS), weighed], renderer)
    assert whole[0] == part[0] and whole[1][-10:] == part[1][-10:] and 0 < sum(part[1]) < sum(whole[1])
    said = tokenizer.decode([token for token, learned in zip(*part, strict=True) if learned])
    assert "Madrid" in said and "Paris" not in said


def test_calls_of_tools_are_learned_and_their_answers_are_not(tmp_path):
    call = {"type": "function", "function": {"name": "capital", "arguments": {"of": "Spain"}}}
    turns = [
        *messages(TURNS[2]), {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "Madrid, of course"}, *messages(("assistant", "It is that.")),
    ]  # fmt: skip
    tools = [{"type": "function", "function": {"name": "capital"}}]
    for source in (QWEN3.source, QWEN3.unmarked):
        tokenizer = open_chat_tokenizer(str(write_folder(tmp_path, QWEN3, source)), None, {})
        with Renderer(tokenizer.template) as renderer:
            (said,) = renderer.conversations([conversation_of({"messages": turns, "tools": tools})])
        assert isinstance(said, Said), said
        parts = [said.text[start:end] for start, end in said.spans]
        assert "arguments" in parts[0] and parts[0].endswith("</tool_call><|im_end|>") and len(parts) == 2
        assert parts[1].endswith("It is that.<|im_end|>") and not any("Madrid" in part for part in parts)
        assert "# Tools" in said.text


BAD = {
    "no object": ([1], "not an object with a conversation"),
    "no columns": ({"text": "a"}, r"no conversation in its columns \(text\)"),
    "no assistant": ({"messages": messages(TURNS[0])}, "no message of an assistant"),
    "two users": ({"messages": messages(TURNS[0], TURNS[0], TURNS[1])}, r"out of order \(message 2, the user's, follows the user's"),
    "assistant first": ({"messages": messages(TURNS[1], TURNS[0])}, r"out of order \(message 1, the assistant's, is the first"),
    "late system": ({"messages": messages(*TURNS[:2], ("system", "s"))}, r"message 3, the system's, follows the assistant's"),
    "role": ({"messages": messages(("human", "x"), ("robot", "y"))}, r"an unknown role \(message 2: 'robot'"),
    "nothing said": ({"messages": messages(TURNS[0], ("assistant", " "))}, r"says nothing \(message 2"),
    "picture": ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *messages(TURNS[1])]}, "content that is no text"),
    "weight": ({"messages": [*messages(TURNS[0]), {"role": "assistant", "content": "x", "weight": 2}]}, "weight that is not 0 or 1"),
    "none learned": ({"messages": [*messages(TURNS[0]), {"role": "assistant", "content": "x", "weight": 0}]}, "that is learned"),
    "text": ({"messages": "hello"}, "messages is a text, and not JSON"),
    "empty": ({"messages": []}, "messages is no list of messages"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_is_no_conversation_says_why(name):
    row, why = BAD[name]
    with pytest.raises(BadRow, match=why) as refusal:
        conversation_of(row)
    assert "\n" not in str(refusal.value)


def rendered(source: str, *turns: tuple[str, str], **more: Any) -> Said | BadRow:
    with Renderer(Template(source, "here", {"eos_token": "</s>"}, ("</s>",)), **more) as renderer:
        return renderer.conversations([conversation_of({"messages": messages(*(turns or TURNS[:2]))})])[0]


HOSTILE = {
    "an endless loop": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.2 seconds"),
    "a text that doubles": (
        "{% set ns = namespace(x='aaaaaaaa') %}{% for a in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
        "more memory than",
    ),
    "a large text": ("{% for a in range(2000) %}{{ 'a' * 99999 }}{% endfor %}", "more than 67,108,864 characters"),
    "repeated": ("{{ 'a' * 10**10 }}", "it repeats what then has more than"),
    "a power": ("{{ 10 ** 99999 }}", "it raises to a power above 64"),
    "classes": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
    "globals": ("{{ raise_exception.__globals__['json'] }}", "unsafe|undefined"),
    "names of Python's": ("{% set ns = namespace(__class__=1) %}{{ ns }}", "a name of Python's own"),
    "another file": ("{% include '/etc/passwd' %}", "no loader"),
    "a change of the data": ("{{ messages.append(1) }}", "unsafe|undefined"),
    "its own refusal": ("{{ raise_exception('only two\\nroles') }}", "the template fails .only two"),
    "a mistake": ("{{ messages[0].content + 1 }}", "TypeError"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_strangers_template_is_bounded_and_named(name):
    source, why = HOSTILE[name]
    found = rendered(source, seconds=0.2, memory_bytes=256 << 20)
    assert isinstance(found, BadRow) and "\n" not in str(found)
    assert re.search(why, str(found)), found


def test_a_template_that_gives_no_answer_is_named_and_the_others_are_rendered():
    """One long call of C, which no signal of Python ends: its process is, and the conversation behind it is what it was."""
    source = (
        "{% if messages[0].content == 'hang' %}{% set ns = namespace(x=3) %}{% for a in range(40) %}{% set ns.x = ns.x * ns.x %}"
        "{% endfor %}{% endif %}{% for m in messages %}{{ m.content + '</s>' }}{% endfor %}"
    )
    several = [
        conversation_of({"messages": messages(("user", text), ("assistant", "b"))}) for text in ("a", "hang", "c")
    ]
    with Renderer(Template(source, "here", {}, ("</s>",)), seconds=0.05, patience_seconds=0.5) as renderer:
        first, hung, last = renderer.conversations(several)
    assert first == Said("a</s>b</s>", ((5, 10),)) and last == Said("c</s>b</s>", ((5, 10),))
    assert isinstance(hung, BadRow) and "passes its limits" in str(hung)


INEXACT = {
    "an assistant that is left out": ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "not found exactly"),
    "said twice": ("{% for m in messages %}{{ m.content * 2 }}{% endfor %}!", "not found exactly"),
    "marks nothing": ("{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}", "marks nothing"),
    "a prompt of its own": (
        "{% for m in messages %}{{ m.role + ':' }}{{ ' ' }}{{ m.content }}{% endfor %}{{ 'X' if add_generation_prompt }}", "not found",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INEXACT)
def test_what_is_not_found_exactly_is_refused(name):
    source, why = INEXACT[name]
    found = rendered(source)
    assert isinstance(found, BadRow) and why in str(found), found


def test_a_template_that_is_none_is_refused_with_its_file(tmp_path):
    folder = write_folder(tmp_path, CHATML, "{% for %}")
    tokenizer = open_chat_tokenizer(str(folder), None, {})
    with pytest.raises(
        ValueError, match=r"chat_template.jinja: no template that can be used: line 1: .*give data.template"
    ):
        Renderer(tokenizer.template).__enter__()


def test_a_folder_says_what_it_lacks(tmp_path):
    folder = write_folder(tmp_path / "a", CHATML)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink()
    assert open_chat_tokenizer(str(folder), None, {}).template.source == "{{ 'not this' }}"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    assert open_chat_tokenizer(str(folder / "tokenizer.json"), None, {"a": 1}).template.values == {
        "eos_token": "<|im_end|>",
        "a": 1,
    }
    for changed, why in (
        ({}, "no chat template in it .*data.template=PATH"),
        (
            {"bos_token": {"content": "<s>"}, "chat_template": "x"},
            "names '<s>' as bos_token, and tokenizer.json beside it has no",
        ),
        ({"added_tokens_decoder": {"999": {"content": "<x>"}}, "chat_template": "<x>"}, "names '<x>' as token 999"),
    ):
        (folder / "tokenizer_config.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=why):
            open_chat_tokenizer(str(folder), None, {})
    for choice in ("", "bytes"):
        with pytest.raises(ValueError, match=r"give data.tokenizer=FOLDER"):
            open_chat_tokenizer(choice, None, {})
    with pytest.raises(ValueError, match=r"data.template=none: cannot be read"):
        open_chat_tokenizer(str(folder), "none", {})
