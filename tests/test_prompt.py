"""Prompts and tokens: where a turn ends, no control tokens in texts, long notes shortened."""

import copy
import json
from dataclasses import asdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import CHAT_TEMPLATES, CountingTokenizer, encoder_for, tiny_tokenizer

from sft.cli import InputError
from sft.data.prompt import (
    PromptEncoder,
    PromptTemplate,
    build_template,
    control_token_ids,
    set_chat_template,
)
from sft.data.text import clean_text
from sft.grounding.sentences import SENTENCE_VERSION, number_sentences, sentence_spans

any_text = st.text(max_size=120) | st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<s>",
            "</s>",
            "<|header|>",
            "<|eot|>",
            "[INST]",
            "<|im_",
            "end|>",
            "fever ",
            "\n",
            ". ",
        ]
    ),
    max_size=15,
).map("".join)


# ------------------------------------------------------------------------------- template


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
def test_generation_stops_at_the_end_of_turn_and_at_eos(chat):
    tokenizer = tiny_tokenizer(chat)
    template = build_template(tokenizer)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot|>", "mistral": "</s>", "none": "</s>"}[chat]
    assert template.end_token_id == tokenizer.convert_tokens_to_ids(end)
    assert set(template.stop_token_ids) == {template.end_token_id, tokenizer.eos_token_id}


# What a prompt and what an answered conversation write after "<|im_start|>assistant\n"
BEFORE_ANSWERS = {
    "channel": ("", "[INST]final[/INST]"),
    "empty thoughts": ("", "<think>\n\n</think>\n\n"),
    "empty thoughts in both": ("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
    "thoughts opened": ("<think>\n", ""),
}


@pytest.mark.parametrize("kind", BEFORE_ANSWERS)
def test_the_summary_stands_where_the_template_writes_an_answer(kind):
    in_prompt, in_answer = BEFORE_ANSWERS[kind]
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        f"{{% if m['role'] == 'assistant' %}}{in_answer}{{% endif %}}"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        f"{{% if add_generation_prompt %}}<|im_start|>assistant\n{in_prompt}{{% endif %}}"
    )
    template = build_template(tokenizer, instruction="Be brief.")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Fever."},
        {"role": "assistant", "content": "It is fever."},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered.startswith(f"{template.prefix}Fever.{template.suffix}It is fever.<|im_end|>")


def test_one_of_several_chat_templates(tmp_path):
    tokenizer = copy.deepcopy(tiny_tokenizer())
    both = {"short": CHAT_TEMPLATES["chatml"], "long": CHAT_TEMPLATES["mistral"]}
    tokenizer.chat_template = dict(both)
    with pytest.raises(InputError, match="several chat templates and no default: short, long\nchoose one"):
        set_chat_template(tokenizer, None)
    set_chat_template(tokenizer, "long")
    assert tokenizer.chat_template == both["long"]
    tokenizer.chat_template = {**both, "default": both["short"]}
    set_chat_template(tokenizer, None)
    assert tokenizer.chat_template == both["short"]
    file = tmp_path / "mine.jinja"
    file.write_text(both["long"])
    set_chat_template(tokenizer, str(file))
    assert tokenizer.chat_template == both["long"]
    with pytest.raises(InputError, match="not a readable text file"):
        set_chat_template(tokenizer, str(tmp_path / "missing.jinja"))


def test_an_end_token_that_nobody_trained_is_replaced_by_eos(capsys):
    tokenizer = tiny_tokenizer("llama3")
    end = build_template(tokenizer).end_token_id
    assert end != tokenizer.eos_token_id
    template = build_template(tokenizer, is_untrained=lambda token: token == end)
    assert template.end_token_id == tokenizer.eos_token_id
    assert end in template.stop_token_ids
    assert "never learned <|eot|>" in capsys.readouterr().err
    assert build_template(tokenizer, is_untrained=lambda token: True).end_token_id == end
    assert "warning: " in capsys.readouterr().err


def test_a_template_that_hides_the_answer_does_not_end_it_with_a_start_token():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"].replace(
        "m['content'] }}", "m['content'] if m['role'] != 'assistant' else '' }}"
    )
    assert build_template(tokenizer).end_token_id == tokenizer.eos_token_id


def test_an_end_of_turn_with_id_0_is_kept():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = CHAT_TEMPLATES["chatml"].replace("<|im_end|>", "<unk>")
    tokenizer.unk_token = None
    end = tokenizer.convert_tokens_to_ids("<unk>")
    assert end == 0
    template = build_template(tokenizer)
    assert template.end_token_id == end
    assert template.stop_token_ids == (end, tokenizer.eos_token_id)


def test_a_template_that_leaves_out_the_note_is_refused():
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{% endfor %}"
    with pytest.raises(InputError, match="leaves out the user's message"):
        build_template(tokenizer)


def test_template_survives_json():
    template = build_template(tiny_tokenizer("llama3"), number_sentences=True)
    assert PromptTemplate.from_dict(json.loads(json.dumps(asdict(template)))) == template


def test_a_template_keeps_the_sentences_it_was_trained_with():
    template = build_template(tiny_tokenizer(), number_sentences=True)
    values = asdict(template)
    assert values.pop("sentence_version") == SENTENCE_VERSION
    note = "The patient has no\nfever."
    # Adapters of format 1 and 2 do not name the version
    assert PromptTemplate.from_dict(values).render_note(note) == "S1: The patient has no\nS2: fever."
    assert template.render_note(note) == "S1: The patient has no fever."


@pytest.mark.parametrize(
    "damage",
    [
        {"sentence_version": SENTENCE_VERSION + 1},
        {"prefix": 1},
        {"stop_token_ids": []},
        {"stop_token_ids": None},
        {"end_token_id": "2"},
        {"unknown": 1},
    ],
)
def test_a_damaged_template_is_an_error(damage):
    values = asdict(build_template(tiny_tokenizer()))
    with pytest.raises(TypeError):
        PromptTemplate.from_dict({**values, **damage})
    del values["suffix"]
    with pytest.raises(KeyError):
        PromptTemplate.from_dict(values)


def test_tokenizer_without_an_end_token_is_refused():
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer("none").backend_tokenizer)
    with pytest.raises(InputError, match="end-of-sequence"):
        build_template(bare)


# ------------------------------------------------------------------------------- texts


@pytest.mark.parametrize("chat", CHAT_TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(any_text)
def test_text_never_becomes_a_control_token_and_nothing_of_it_is_lost(chat, text):
    encoder = encoder_for(chat)
    ids = encoder.encode_texts([text])[0]
    assert not control_token_ids(encoder.tokenizer) & set(ids)
    assert encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_unpaired_surrogates_do_no_harm():
    assert encoder_for("chatml").encode_texts([clean_text("fever \ud83d today")])[0]


def test_unknown_tokens_are_kept():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "fever": 2, "of": 3}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    encoder = PromptEncoder(tokenizer, build_template(tokenizer))
    assert encoder.encode_texts(["fever of µ </s>"])[0][:3] == [2, 3, 0]


# ------------------------------------------------------------------------------- shortening


@pytest.mark.parametrize("numbered", [False, True])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            ["Fever.", "No cough today.", "BP 120/80, HR 72.\n", "Unbrokenword" * 9 + ".", "é\U0001f600 x."]
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(8, 120),
)
def test_a_long_note_keeps_the_most_sentences_that_fit(numbered, sentences, room):
    encoder = encoder_for("chatml", number_sentences=numbered)
    note = clean_text(" ".join(sentences))
    ids, n_kept = encoder.shorten(note, room)
    assert 0 < len(ids) <= room or not ids
    ends = [end for _, end in sentence_spans(note)]
    beginnings = [
        "\n".join(number_sentences(note)[:n]) if numbered else note[: ends[n - 1]]
        for n in range(1, len(ends) + 1)
    ]
    fitting = [text for text in beginnings if len(encoder.encode_texts([text])[0]) <= room]
    assert n_kept == len(fitting)
    if fitting:
        assert ids == encoder.encode_texts([fitting[-1]])[0]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(any_text, min_size=1, max_size=12),
    st.integers(8, 80),
    st.sampled_from(["chatml", "llama3", "mistral"]),
    st.booleans(),
)
def test_a_slow_tokenizer_shortens_the_same(texts, room, chat, numbered):
    note = clean_text(". ".join(texts))
    fast = encoder_for(chat, number_sentences=numbered)
    slow = PromptEncoder(CountingTokenizer(fast.tokenizer, is_fast=False), fast.template)
    ids, n_kept = slow.shorten(note, room)
    same_ids, same_n_kept = fast.shorten(note, room)
    assert n_kept == same_n_kept
    assert ids == same_ids if n_kept else len(ids) <= room


@given(st.text(alphabet="患者发热咳嗽三天e\u0301🫀 ", min_size=1, max_size=200), st.integers(1, 40))
def test_a_note_without_blanks_is_cut_between_characters(note, room):
    encoder = encoder_for("none")
    ids, _ = encoder.shorten(note, room)
    assert len(ids) <= room
    kept = encoder.tokenizer.decode(ids)
    assert note.startswith(kept)
    assert not (kept and note[len(kept) :].startswith("\u0301"))
    # A character of these takes four tokens at most, and one that combines with it two more
    assert kept.rstrip() == note.rstrip() or len(ids) >= min(room - 7, room // 2)
