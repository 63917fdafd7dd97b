"""Text: decoding piece by piece against the tokenizer library, chat templates against transformers."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

import moe_jax.text
from moe_jax.text import Detokenizer, Tokenizer, full_text

DEMO = Path(moe_jax.text.__file__).parent / "demo"
SAMPLE = "The quick brown fox — naïve café, 🙂🚀 日本語 and 'quotes'. It's   spaced\n\tout. " * 4
RUNS = settings(max_examples=150, deadline=None)


def byte_level() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    backend.train_from_iterator([SAMPLE], trainer)
    backend.add_tokens(["<tool call>"])  # added, but text
    return backend


def sentencepiece() -> tokenizers.Tokenizer:
    """The shape of Llama's and Mixtral's tokenizer.json."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words += ["▁", *"abcdefghijklmnopqrstuvwxyz.é", "▁a", "▁the", "he", "▁▁", "▁▁▁▁", "日"]
    backend = tokenizers.Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


def with_decoder(decoder: object, words: list[str]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0]))
    backend.decoder = decoder
    return backend


TOKENIZERS = {
    "byte_level": Tokenizer(byte_level(), {"eos_token": "<eos>"}),
    "sentencepiece": Tokenizer(sentencepiece(), {"bos_token": "<s>", "eos_token": "</s>"}),
    "metaspace": Tokenizer(with_decoder(decoders.Metaspace(), ["a", "▁b", "▁", "▁the", "é", "日"])),
    "wordpiece": Tokenizer(with_decoder(decoders.WordPiece(cleanup=False), ["a", "##b", "the", "##é", "x"])),
    "none": Tokenizer(with_decoder(None, ["a", "b", "the"])),
}
if (DEMO / "tokenizer.json").exists():
    TOKENIZERS["demo"] = Tokenizer.from_directory(DEMO)
EXACT = [name for name in TOKENIZERS if name != "sentencepiece"]


def token_ids(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids anywhere in the vocabulary (a little beyond it too), and runs that spell real text."""
    noise = st.integers(0, tokenizer.vocab_size + 3)
    text = st.text(st.sampled_from("aé日🙂🚀 the.") | st.characters(exclude_categories=["Cs"]), max_size=6)
    runs = st.one_of(noise.map(lambda i: [i]), text.map(lambda t: tokenizer.encode(t)))
    return st.lists(runs, max_size=12).map(lambda parts: [i for part in parts for i in part])


def streamed(tokenizer: Tokenizer, ids: list[int], cuts: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    """The deltas when the tokens come in the groups that `cuts` makes."""
    detokenizer = Detokenizer(tokenizer, stop)
    edges = [0, *sorted(c % (len(ids) + 1) for c in cuts), len(ids)]
    return [detokenizer.push(ids[a:b]) for a, b in pairwise(edges)] + [detokenizer.flush()]


@pytest.mark.parametrize("name", TOKENIZERS)
@RUNS
@given(data=st.data())
def test_text_does_not_depend_on_grouping(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(token_ids(tokenizer))
    stop = tuple(data.draw(st.lists(st.text("ab the.é�", min_size=1, max_size=4), max_size=3)))
    whole = full_text(tokenizer, ids, stop)
    for cuts in (data.draw(st.lists(st.integers(0, 1000), max_size=6)), list(range(len(ids)))):
        assert "".join(streamed(tokenizer, ids, cuts, stop)) == whole.text
    assert full_text(tokenizer, ids[: whole.tokens], stop) == whole
    # The rule itself: the first stop string to be completed cuts the text.
    plain = full_text(tokenizer, ids).text
    ends = [(plain.find(s) + len(s), -len(s), s) for s in stop if s in plain]
    if ends:
        end, _, first = min(ends)
        assert (whole.text, whole.stop) == (plain[: end - len(first)], first)
    else:
        assert (whole.text, whole.stop, whole.tokens) == (plain, None, len(ids))


@pytest.mark.parametrize("name", EXACT)
@RUNS
@given(data=st.data())
def test_text_is_the_librarys(name: str, data: st.DataObject) -> None:
    ids = data.draw(token_ids(TOKENIZERS[name]))
    assert full_text(TOKENIZERS[name], ids).text == TOKENIZERS[name].decode(ids)


@RUNS
@given(
    text=st.text(st.sampled_from("aé日🙂🚀 the.") | st.characters(exclude_categories=["Cs"])), skip=st.integers(0, 3)
)
def test_sentencepiece_text_is_the_librarys_when_valid(text: str, skip: int) -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    ids = tokenizer.encode(text)
    assert full_text(tokenizer, ids).text == tokenizer.decode(ids)
    if text.isascii():  # any suffix of it is valid as well
        assert full_text(tokenizer, ids[skip:]).text == tokenizer.decode(ids[skip:])


def test_no_half_characters() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    ids = byte_ids(tokenizer, "🙂é".encode())
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "🙂", "", "é"]
    assert detokenizer.push(byte_ids(tokenizer, b"\xf0\x9f")) == ""
    assert detokenizer.flush() == "�"


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    ids = {tokenizer.piece(i, None): i for i in range(tokenizer.vocab_size) if tokenizer.is_text(i)}
    return [ids[bytes([b])] for b in data]


def test_stop_strings_hold_back_only_what_they_must() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, ("abab!", "xyz"))
    deltas = [detokenizer.push(byte_ids(tokenizer, bytes([b]))) for b in b"qababab-xyab"]
    assert deltas == ["q", "", "", "", "", "ab", "", "abab-", "", "", "xy", ""]
    assert detokenizer.flush() == "ab"
    detokenizer = Detokenizer(tokenizer, ("END",))
    ids = byte_ids(tokenizer, b"one ENENDtwo")
    assert detokenizer.push(ids) == "one EN"
    assert (detokenizer.stop, detokenizer.tokens) == ("END", 9)
    assert detokenizer.push(ids) == "" and detokenizer.flush() == ""


def test_special_tokens_are_no_text() -> None:
    tokenizer = TOKENIZERS["byte_level"]
    eos = tokenizer.eos_token_ids[0]
    assert full_text(tokenizer, [eos, *tokenizer.encode("hi"), eos]).text == "hi"
    added = tokenizer.encode("<tool call>")
    assert len(added) == 1 and full_text(tokenizer, added).text == "<tool call>"


def test_cost_is_linear() -> None:
    """Broken bytes and near-matches of a stop string are the bad cases of a decoder that looks back."""
    tokenizer = TOKENIZERS["byte_level"]
    detokenizer = Detokenizer(tokenizer, ("a" * 500 + "b",))
    started = time.perf_counter()
    for i in byte_ids(tokenizer, b"\x80") * 20_000 + byte_ids(tokenizer, b"a") * 20_000:
        detokenizer.push([i])
    assert time.perf_counter() - started < 2.0


# -- the model directory --------------------------------------------------------------------------------------------


def model_dir(path: Path, backend: tokenizers.Tokenizer, **files: object) -> Path:
    backend.save(str(path / "tokenizer.json"))
    for name, value in files.items():
        (path / f"{name}.json").write_text(json.dumps(value))
    return path


def test_encode_as_transformers_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    for i, config in enumerate(
        (
            {"bos_token": "<s>", "eos_token": "</s>"},
            {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", "add_bos_token": False},
            {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "add_eos_token": True},
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "he"},
        )
    ):
        path = tmp_path / str(i)
        path.mkdir()
        backend = sentencepiece()
        backend.enable_truncation(4)  # as some published files have it
        model_dir(path, backend, tokenizer_config={"tokenizer_class": "PreTrainedTokenizerFast", **config})
        theirs = transformers.AutoTokenizer.from_pretrained(path)
        ours = Tokenizer.from_directory(path)
        for text in ("the he a", "", "日本 🙂", "<s>he</s>"):
            ids = ours.encode(text)
            assert ids == theirs(text)["input_ids"], config
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_eos_ids(tmp_path: Path) -> None:
    path = model_dir(tmp_path, byte_level(), tokenizer_config={"eos_token": "<pad>"})
    assert Tokenizer.from_directory(path).eos_token_ids == (1,)
    (path / "config.json").write_text('{"eos_token_id": 7}')
    assert Tokenizer.from_directory(path).eos_token_ids == (7,)
    (path / "generation_config.json").write_text('{"eos_token_id": [3, 4]}')
    assert Tokenizer.from_directory(path).eos_token_ids == (3, 4)


def test_broken_files_are_named(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(ValueError) as error:
            Tokenizer.from_directory(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model"')
    assert "tokenizer.json" in message()
    byte_level().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("[1]")
    assert "tokenizer_config.json: expected a JSON object" in message()
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": 3}')
    assert "tokenizer_config.json: chat_template" in message()
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "generation_config.json: eos_token_id" in message()
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe")
    assert "generation_config.json" in message()
    with pytest.raises(ValueError, match="no such model directory"):
        Tokenizer.from_directory(tmp_path / "nowhere")


def test_without_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert tokenizer.eos_token_ids == (2,)
    assert full_text(tokenizer, [1, 2, 3]).text == tokenizer.decode([1, 2]) == ""
    with pytest.raises(ValueError, match="no tokenizer.json"):
        tokenizer.encode("hi")


def test_invalid_unicode_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        TOKENIZERS["byte_level"].encode("\ud800")


# -- chat templates -------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + " [/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] | trim + " [/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {% generation %}{{- " " + message["content"] + eos_token }}{% endgeneration %}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- macro render(content, role) %}
<|im_start|>{{ role }}
{{ content }}<|im_end|>
{% endmacro -%}
{%- if tools %}
    {{- '<|im_start|>system\\n# Tools\\n<tools>' }}
    {%- for tool in tools %}
        {{- "\\n" }}{{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" and message.content is string %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and '</think>' in message.content and loop.index0 < ns.last_query_index %}
        {{- render(message.content.split('</think>')[-1].lstrip('\\n'), message.role) }}
    {%- else %}
        {{- render(message.content, message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
DATED = "{{ strftime_now('%Y') }} {{ dict(a=1) | tojson }} {{ documents is none }} {{ messages | tojson(indent=2) }}"
CHATS = [
    [{"role": "user", "content": "Hi <b>there</b> 'é'\n"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "<think>hm</think>\n\n4"},
        {"role": "user", "content": " and 3+3? "},
    ],
]
TOOL = {"type": "function", "function": {"name": "é<f>", "parameters": {"type": "object", "properties": {}}}}


@pytest.mark.parametrize("template", [CHATML, MISTRAL, QWEN3, DATED], ids=["chatml", "mistral", "qwen3", "dated"])
@pytest.mark.parametrize("messages", CHATS, ids=["one", "turns"])
@pytest.mark.parametrize("kwargs", [{}, {"enable_thinking": False}, {"tools": [TOOL]}], ids=["", "kwargs", "tools"])
def test_chat_as_transformers_renders_it(template: str, messages: list, kwargs: dict) -> None:
    transformers = pytest.importorskip("transformers")
    backend = sentencepiece()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ours = Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, chat_template=template)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=prompt, **kwargs
        )
        assert ours.render_chat(messages, add_generation_prompt=prompt, **kwargs) == expected
    assert ours.encode_chat(messages, **kwargs)[:2] != [1, 1]  # the template's BOS is the only one


def test_chat_template_files(tmp_path: Path) -> None:
    named = [
        {"name": "default", "template": "D"},
        {"name": "tool_use", "template": "T"},
        {"name": "x", "template": "X"},
    ]
    path = model_dir(tmp_path, byte_level(), tokenizer_config={"chat_template": named})
    tokenizer = Tokenizer.from_directory(path)
    assert tokenizer.render_chat(CHATS[0]) == "D"
    assert tokenizer.render_chat(CHATS[0], tools=[TOOL]) == "T"
    assert tokenizer.render_chat(CHATS[0], chat_template="x") == "X"
    assert tokenizer.render_chat(CHATS[0], chat_template="{{ messages[0].role }}") == "user"
    (path / "chat_template.jinja").write_text("J")
    assert Tokenizer.from_directory(path).render_chat(CHATS[0]) == "J"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% if %}", "chat template: "),
        ("{{ raise_exception('no such role') }}", "chat template: no such role"),
        ("{{ messages[0].content + 1 }}", "chat template: "),
        ("{{ ''.__class__.__mro__ }}", "chat template: "),
        ("{{ messages.append(1) }}", "chat template: "),
    ],
)
def test_chat_template_errors(template: str | None, message: str) -> None:
    tokenizer = Tokenizer(byte_level(), chat_template=template)
    with pytest.raises(ValueError, match=message) as error:
        tokenizer.render_chat(CHATS[0])
    assert "\n" not in str(error.value)
