"""Text at the edge of the engine: prompts to token ids, chats to prompts, generated token ids to text.

Everything here is a pure function of its arguments and of the tokenizer's files. It knows nothing of JAX, requests,
batches, ranks or time; the engine in one process and the coordinator of many use it alike. Because a stream's text is
a function of its token list alone, a request that moves to another rank goes on with the same text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from jinja2 import Template, TemplateError, ext, nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

NAMED_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A model directory's tokenizer, chat template and end-of-sequence ids.

    Every file is optional: a directory without tokenizer.json still serves prompts given as token ids (`encode`
    then says what is missing, and generated text is empty).
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer | None,
        config: Mapping[str, Any] | None = None,
        eos_token_ids: Sequence[int] = (),
        chat_template: str | Mapping[str, str] | None = None,
        source: str = "tokenizer",
    ):
        """`config` is tokenizer_config.json; `source` names the directory in error messages."""
        self.backend = backend
        self.source = source
        config = config or {}
        self.special_tokens = {name: token for name in NAMED_SPECIAL_TOKENS if (token := _content(config.get(name)))}
        self.chat_templates = _named_templates(chat_template)
        self._pieces: dict[int, bytes] = {}
        if backend is not None:
            _as_transformers(backend, self.special_tokens)
            if not eos_token_ids and (eos := self.token_id("eos_token")) is not None:
                eos_token_ids = (eos,)
        self.eos_token_ids: tuple[int, ...] = tuple(eos_token_ids)

    @classmethod
    def from_directory(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and config.json.

        Raises ValueError, in one line that names the file, when one of them is broken.
        """
        path = Path(path)
        if not path.is_dir():
            raise ValueError(f"{path}: no such model directory")
        backend = None
        if (file := path / "tokenizer.json").exists():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the library raises plain Exception
                raise ValueError(f"{file}: not a tokenizer of the `tokenizers` library: {_one_line(error)}") from error
        config = _read_json(path / "tokenizer_config.json")
        template = config.get("chat_template")
        for name in ("chat_template.jinja", "chat_template.txt"):
            if (file := path / name).exists():
                template = _read_text(file)
                break
        try:
            _named_templates(template)
        except ValueError as error:
            raise ValueError(f"{path / 'tokenizer_config.json'}: {error}") from None
        return cls(backend, config, _eos_token_ids(path), template, source=str(path))

    # -- tokens ---------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows (a model's may be padded beyond it); 0 without tokenizer.json."""
        return self.backend.get_vocab_size() if self.backend is not None else 0

    def token_id(self, name: str) -> int | None:
        """The id of a named special token such as "eos_token"."""
        token = self.special_tokens.get(name)
        return None if token is None or self.backend is None else self.backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the BOS/EOS that the model's tokenizer adds unless told not to.

        Raises ValueError when there is no tokenizer or the text is not valid Unicode.
        """
        if self.backend is None:
            raise ValueError(f"{self.source}: no tokenizer.json, so prompts must be given as token ids")
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError) as error:
            raise ValueError(f"the text is not valid Unicode: {_one_line(error)}") from None

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The tokenizer library's own decoding ("" without tokenizer.json)."""
        if self.backend is None:
            return ""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def piece(self, token_id: int, previous: int | None) -> bytes:
        """The UTF-8 bytes that `token_id` adds to the text; b"" for a token that is no text.

        `previous` is the last token before it that is text.

        Decoders made of the usual steps (byte-level BPE, sentencepiece with byte fallback) give each token its own
        bytes, whatever stands before it. Any other decoder is asked for the pair and for `previous` alone; the
        difference is the piece.
        """
        if self.backend is None or not self.is_text(token_id):
            return b""
        if self._decoder is None:
            before = "" if previous is None else self.backend.decode([previous])
            pair = self.backend.decode([token_id] if previous is None else [previous, token_id])
            return pair[len(before) :].encode()
        piece = self._pieces.get(token_id)
        if piece is None:
            piece = self._pieces[token_id] = self._decoder.piece(self.backend.id_to_token(token_id) or "")
        return piece

    def is_text(self, token_id: int) -> bool:
        """Whether decoding shows the token: it is in the vocabulary, and not special."""
        known = self.backend is not None and self.backend.id_to_token(token_id) is not None
        return known and token_id not in self._special_ids

    @property
    def leading_strip(self) -> tuple[str, int]:
        """(character, count): how many of it the decoder takes off the start of a text."""
        return ("", 0) if self._decoder is None else self._decoder.strip

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        if self.backend is None:
            return frozenset()
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _decoder(self) -> _PieceDecoder | None:
        return None if self.backend is None else _PieceDecoder.of(json.loads(self.backend.to_str())["decoder"])

    # -- chats ----------------------------------------------------------------------------------------------------

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The prompt that the model's chat template makes of `messages`; `kwargs` are the template's variables.

        `chat_template` in `kwargs` is a template's name or source. Raises ValueError when there is no template, or
        when it refuses the messages.
        """
        source = self._chat_template(kwargs.pop("chat_template", None), bool(kwargs.get("tools")))
        variables = {
            **{"tools": None, "documents": None, **self.special_tokens, **kwargs},
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return _compile(source).render(variables)
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"chat template: {_one_line(error)}") from error

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of the rendered chat. The template writes the special tokens, so none are added."""
        return self.encode(self.render_chat(messages, add_generation_prompt, **kwargs), add_special_tokens=False)

    def _chat_template(self, wanted: str | None, tools: bool) -> str:
        names = [wanted] if wanted is not None else (["tool_use"] if tools else []) + ["default"]
        for name in names:
            if name in self.chat_templates:
                return self.chat_templates[name]
        if wanted is not None:
            return wanted
        if self.chat_templates:
            raise ValueError(f"{self.source}: no default chat template, only {', '.join(sorted(self.chat_templates))}")
        raise ValueError(f"{self.source}: no chat template (tokenizer_config.json or chat_template.jinja)")


class Decoded(NamedTuple):
    """The text of a token list. Tokens beyond `tokens` came after the stop string and count for nothing."""

    text: str
    stop: str | None
    tokens: int


def full_text(tokenizer: Tokenizer, token_ids: Sequence[int], stop: Sequence[str] = ()) -> Decoded:
    """The text of a finished output, cut before the first stop string to be completed.

    Equal to `tokenizer.decode(token_ids)` when no stop string occurs, but for one case: where a sentencepiece model
    writes invalid UTF-8 through byte tokens, each broken sequence becomes U+FFFD and the valid ones around it stay.
    """
    detokenizer = Detokenizer(tokenizer, stop)
    text = detokenizer.push(token_ids) + detokenizer.flush()
    return Decoded(text, detokenizer.stop, detokenizer.tokens)


class Detokenizer:
    """One stream's text, token by token: the deltas' concatenation is `full_text`, however tokens were grouped.

    Held back until decided: an incomplete UTF-8 sequence, and text that may be the beginning of a stop string.
    After a stop string, `stop` is that string, `tokens` counts the tokens up to the one that completed it, and
    nothing more is taken or given.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.stop: str | None = None
        self.tokens = 0
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._previous: int | None = None
        self._strip, self._strip_left = tokenizer.leading_strip
        self._matchers = [_StopMatcher(s) for s in stop if s]
        self._held = ""

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these tokens add."""
        out: list[str] = []
        for token_id in token_ids:
            if self.stop is not None:
                break
            self.tokens += 1
            piece = self._tokenizer.piece(token_id, self._previous)
            if self._tokenizer.is_text(token_id):
                self._previous = token_id
            if piece:
                out.append(self._release(self._utf8.decode(piece)))
        return "".join(out)

    def flush(self) -> str:
        """What was held back; to be called once, when no token follows."""
        if self.stop is not None:
            return ""
        text = self._release(self._utf8.decode(b"", final=True))
        if self.stop is None:
            text += self._held
            self._held = ""
        return text

    def _release(self, text: str) -> str:
        """Takes decoded text, gives the part of it and of the held text that no stop string can reach any more."""
        while self._strip_left and text:
            if not text.startswith(self._strip):
                self._strip_left = 0
                break
            text = text[len(self._strip) :]
            self._strip_left -= 1
        if not self._matchers:
            return text
        held = self._held + text
        for end in range(len(self._held) + 1, len(held) + 1):
            complete = [m.stop for m in self._matchers if m.advance(held[end - 1])]
            if complete:
                self.stop = max(complete, key=len)
                self._held = ""
                return held[: end - len(self.stop)]
        keep = len(held) - max(m.matched for m in self._matchers)
        self._held = held[keep:]
        return held[:keep]


class _StopMatcher:
    """Knuth-Morris-Pratt over a stream of characters: `matched` is how much of `stop` the text now ends with."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        self._fallback = [0]  # [i]: length of the longest proper prefix of stop that ends stop[: i + 1]
        for char in stop[1:]:
            self._fallback.append(self._next(self._fallback[-1], char))

    def _next(self, matched: int, char: str) -> int:
        while matched and self.stop[matched] != char:
            matched = self._fallback[matched - 1]
        return matched + (self.stop[matched] == char)

    def advance(self, char: str) -> bool:
        """Takes the next character; True when it completes the stop string. Not to be called after that."""
        self.matched = self._next(self.matched, char)
        return self.matched == len(self.stop)


class _PieceDecoder:
    """A tokenizer.json decoder whose tokens each stand for their own bytes, as a function of one token."""

    def __init__(self, steps: Sequence[Mapping[str, Any]], strip: tuple[str, int]):
        self.strip = strip
        self._replace = [(s["pattern"]["String"], s["content"]) for s in steps if s["type"] == "Replace"]
        self._byte_fallback = any(s["type"] == "ByteFallback" for s in steps)
        self._byte_level = any(s["type"] == "ByteLevel" for s in steps)

    @classmethod
    def of(cls, decoder: Mapping[str, Any] | None) -> _PieceDecoder | None:
        """None when tokens cannot be decoded one by one."""
        if decoder is None:
            return None
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [s["type"] for s in steps]
        strip = ("", 0)
        if "Strip" in kinds:  # only as the last step, on the whole text
            last = steps[-1]
            if kinds[-2:] != ["Fuse", "Strip"] or kinds.count("Strip") > 1 or last["stop"] or not last["content"]:
                return None
            steps, kinds, strip = steps[:-1], kinds[:-1], (last["content"], last["start"])
        kinds = [k for k in kinds if k != "Fuse"]
        if any(s["type"] == "Replace" and "String" not in s["pattern"] for s in steps):
            return None
        # The kinds are known and in the order in which `piece` applies them.
        order = ["Replace"] * kinds.count("Replace")
        if kinds in (["ByteLevel"], order, [*order, "ByteFallback"]):
            return cls(steps, strip)
        return None

    def piece(self, token: str) -> bytes:
        if self._byte_level:
            try:
                return bytes(_BYTE_LEVEL[c] for c in token)
            except KeyError:  # an added token, written as it is
                return token.encode()
        for pattern, content in self._replace:
            token = token.replace(pattern, content)
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        return token.encode()


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's reversible map of bytes to printable characters (openai/gpt-2, encoder.py), inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


# -- files --------------------------------------------------------------------------------------------------------


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read: {_one_line(error)}") from error


def _read_json(file: Path) -> dict[str, Any]:
    """The object in `file`, {} when there is no such file."""
    if not file.exists():
        return {}
    try:
        value = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def _eos_token_ids(path: Path) -> tuple[int, ...]:
    """As `transformers` generates: generation_config.json decides, else config.json; an id or a list of ids."""
    for name in ("generation_config.json", "config.json"):
        config = _read_json(path / name)
        text_config = config.get("text_config")
        for part in (config, text_config if isinstance(text_config, dict) else {}):
            ids = part.get("eos_token_id")
            if ids is None:
                continue
            ids = ids if isinstance(ids, list) else [ids]
            if not all(type(i) is int for i in ids):
                raise ValueError(f"{path / name}: eos_token_id must be an integer or a list of integers, found {ids!r}")
            return tuple(ids)
    return ()


def _content(token: Any) -> str | None:
    """A special token of tokenizer_config.json: its text, or an object with the text in "content"."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _as_transformers(backend: tokenizers.Tokenizer, special: Mapping[str, str]) -> None:
    """What `transformers` 5 changes in a tokenizer.json after loading it.

    It ignores tokenizer_config.json's add_bos_token when there is a tokenizer.json, whose post-processor decides.
    """
    backend.no_truncation()
    backend.no_padding()
    backend.add_special_tokens([token for token in special.values() if backend.token_to_id(token) is not None])


def _named_templates(template: Any) -> dict[str, str]:
    """tokenizer_config.json's chat_template: a template, or a list of {"name", "template"}."""
    if isinstance(template, list) and all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in template):
        template = {t["name"]: t["template"] for t in template}
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, Mapping) and all(isinstance(v, str) for v in template.values()):
        return dict(template)
    raise ValueError("chat_template must be a string or a list of {name, template}")


# -- templates ----------------------------------------------------------------------------------------------------


class _GenerationTag(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's text for training; here it is just its content."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates of the Hub expect (transformers/utils/chat_template_utils.py); they are untrusted code."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    return environment


_ENVIRONMENT = _environment()
_COMPILED: dict[str, Template] = {}


def _compile(source: str) -> Template:
    template = _COMPILED.get(source)
    if template is None:
        if len(_COMPILED) >= 64:  # a request may bring its own template
            _COMPILED.clear()
        template = _COMPILED[source] = _ENVIRONMENT.from_string(source)
    return template


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
