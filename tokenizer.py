"""Text to token ids and back, for the two files in which Llama-like checkpoints keep a byte-level BPE.

tokenizer.json (Hugging Face): vocabulary {token: id}, merges [(left, right), ...] by priority, pre-tokenizer
    (how text is cut into the pieces inside which bytes merge) and added tokens (found in the text before all
    that). Tokens are spelled in 256 printable characters that stand for the bytes: "Ġ" is a space.
tokenizer.model (Meta, Llama 3): lines "base64(token) rank". The rank is merge priority and id at once; the
    regex and the 256 special tokens that follow the last rank are not in the file.

Both become one regex and one list of tokens by merge priority, which is what tiktoken.Encoding takes. Its
ranks are mapped to ids afterwards, since a tokenizer.json may number its tokens as it likes.
"""
import base64
import codecs
import json
import re
from contextlib import contextmanager
from itertools import groupby, pairwise, product, takewhile
from pathlib import Path
from typing import NamedTuple

import tiktoken

from errors import UserError

GPT2_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The Digits pre-tokenizer cuts at digits before the GPT-2 regex sees the text: no space joins a digit, and
# whitespace before a digit ends its piece, so that it keeps its last space.
DIGITS_REGEX = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_REGEX = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3_SPECIAL_TOKENS = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{i}|>" for i in range(2, 247)))

# A turn of a chat: marker, text, marker, text, ... The header of an answer is all but the last two.
CHAT_TURN = {
    "llama3": ("<|start_header_id|>", "{role}", "<|end_header_id|>", "\n\n{content}", "<|eot_id|>", ""),
    "chatml": ("<|im_start|>", "{role}\n{content}", "<|im_end|>", "\n")}
CHAT_MARKERS = {marker for turn in CHAT_TURN.values() for marker in turn[::2]}
CHAT_STOPS = "<|eot_id|>", "<|eom_id|>", "<|im_end|>"
# A template's own system message for chats without one, if it is one string literal (SmolLM2).
DEFAULT_SYSTEM = re.compile(
    r"""(['"])<\|im_start\|>system(?:\n|\\n)((?:(?!\1)[^\\]|\\.)*?)<\|im_end\|>""", re.DOTALL)

MAX_WHITESPACE = 25_000  # in a row: tiktoken's regex engine backtracks there, its stack overflows before 1e6
LONG_WHITESPACE = re.compile(r"(?<!\s)\s{%d}" % (MAX_WHITESPACE + 1))

_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
BYTE_OF_CHAR = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_OTHERS)}


class Vocabulary(NamedTuple):
    """What either file says."""
    regex: str
    ranked: list[tuple[bytes, int]]  # (token, id) by merge priority; id -1: a byte that is no token
    bytes_of: dict[int, bytes]       # of every id but the added tokens'
    added: dict[str, int]            # tokens found in the text before it is cut into pieces
    special: set[str]                # those of them that aren't text
    prefix: list[int]                # ids that open a prompt


class Tokenizer:
    """encoding: tiktoken.Encoding (of merge ranks); special_tokens: {text: id}; vocab_size: highest id + 1;
    chat_template: "llama3", "chatml" or None; chat_stop_ids: ids that end an answer, besides eos_ids."""

    def __init__(self, vocabulary, bos_id=None, eos_ids=(), template=None):
        """template: source of the checkpoint's chat template, None if it has none."""
        ranks = {token: rank for rank, (token, _) in enumerate(vocabulary.ranked)}
        self.encoding = tiktoken.Encoding(
            "checkpoint", pat_str=vocabulary.regex, mergeable_ranks=ranks, special_tokens={})
        self._id_of_rank = [token_id for _, token_id in vocabulary.ranked]
        self._added = vocabulary.added
        # chat markers are special even if a checkpoint doesn't say so: text must not forge them
        special = vocabulary.special | CHAT_MARKERS
        self.special_tokens = {token: i for token, i in self._added.items() if token in special}
        self._bytes = vocabulary.bytes_of | {
            i: b"" if token in special else token.encode() for token, i in self._added.items()}
        self.vocab_size = max(self._bytes) + 1
        self.bos_id, self.eos_ids, self._prefix = bos_id, tuple(eos_ids), vocabulary.prefix
        self._find_all, self._find_plain = _finder(self._added), _finder(self._added.keys() - special)

        known = [name for name, turn in CHAT_TURN.items() if self._added.keys() >= set(turn[::2])
                 and (not template or turn[0] in template)]
        self.chat_template = known[0] if known else None
        self.chat_stop_ids = tuple(self._added[stop] for stop in CHAT_STOPS if stop in self._added)
        system = self.chat_template == "chatml" and DEFAULT_SYSTEM.search(template or "")
        self._default_system = system and system[2].replace(r"\n", "\n").replace(rf"\{system[1]}", system[1])
        has_bos = re.search(r"bos_token|<\|begin_of_text", template) if template else known[:1] == ["llama3"]
        self._chat_prefix = [bos_id] if has_bos and bos_id is not None else []

    @classmethod
    def from_folder(cls, folder):
        """Reads tokenizer.json, else Meta's tokenizer.model (here or in original/), and what other files say
        on BOS, EOS and chat. UserError: no such file, a broken one, one whose ids this code can't match."""
        folder = Path(folder)
        files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "original/tokenizer.model")]
        path = next((path for path in files if path.exists()), None)
        if path is None:
            raise UserError(f"{folder}: found no tokenizer; expected tokenizer.json (Hugging Face) or "
                            "[original/]tokenizer.model (Meta): give a checkpoint folder that has one")
        config, names, model, generation = (_read_json(folder / f"{name}.json", optional=True) for name in (
            "tokenizer_config", "special_tokens_map", "config", "generation_config"))
        names, numbers = names | config, model | generation
        template, jinja = config.get("chat_template"), folder / "chat_template.jinja"
        if jinja.exists():
            with _reading(jinja):
                template = jinja.read_text(encoding="utf-8")
        with _reading(path):
            if path.suffix == ".json":
                vocabulary = _hf_vocabulary(path, _read_json(path))
            else:
                vocabulary = _meta_vocabulary(path, path.read_bytes())
                names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"} | names

            def ids(kind):  # one by name, maybe more by number: Llama 3 has several EOS
                name, listed = names.get(f"{kind}_token"), numbers.get(f"{kind}_token_id")
                named = vocabulary.added.get(name["content"] if isinstance(name, dict) else name)
                listed = listed if isinstance(listed, list) else [listed]
                return [i for i in dict.fromkeys([named, *listed]) if i is not None]

            bos_id = next(iter(ids("bos") + vocabulary.prefix), None)
            if config.get("add_bos_token") and not vocabulary.prefix and bos_id is not None:
                vocabulary.prefix.append(bos_id)
            if isinstance(template, list):  # several, with names
                template = {entry["name"]: entry["template"] for entry in template}.get("default")
            return cls(vocabulary, bos_id, ids("eos"), template)

    def encode(self, text, special=False):
        """Ids of the text, as HF's tokenizers gives them. special: whether special tokens written in the text
        become their ids; if not, they are text like any other."""
        if LONG_WHITESPACE.search(text):
            raise UserError(f"more than {MAX_WHITESPACE} whitespace characters in a row: shorten the text")
        ids, finder = [], self._find_all if special else self._find_plain
        for i, part in enumerate(finder.split(text)):  # text, an added token, text, ...
            ids += [self._added[part]] if i % 2 else [
                self._id_of_rank[rank] for rank in self.encoding.encode_ordinary(part)]
        return [token_id for token_id in ids if token_id >= 0]

    def prompt(self, text):
        """Ids of a raw prompt: special tokens in it count; BOS comes first where the checkpoint adds one."""
        return self._prefix + self.encode(text, special=True)

    def chat(self, messages):
        """Ids of a chat [{"role": ..., "content": ...}, ...] and of the header of the assistant's answer.
        Text can't forge special tokens. "llama3" is Llama 3.0's format, without 3.1's dates and tools."""
        if self.chat_template is None:
            raise UserError("the checkpoint has no chat template known here (expected Llama 3's or ChatML): "
                            "use a raw prompt, or an instruct model")
        turns = []
        for message in messages:
            match message:
                case {"role": str(role), "content": str(content)}:
                    turns.append((role, content))
                case _:
                    raise UserError(f'message {message!r:.80}: expected {{"role": text, "content": text}}')
        if self._default_system and turns and turns[0][0] != "system":
            turns.insert(0, ("system", self._default_system))
        ids, form = list(self._chat_prefix), CHAT_TURN[self.chat_template]
        for parts, role, content in [*((form, *turn) for turn in turns), (form[:-2], "assistant", "")]:
            content = content.strip() if self.chat_template == "llama3" else content  # as its template does
            for marker, text in zip(parts[::2], parts[1::2]):
                ids += [self._added[marker], *self.encode(text.format(role=role, content=content))]
        return ids

    def decode(self, ids):
        """Text of the ids, without special tokens and ids past the vocabulary (padded models)."""
        return b"".join(self._bytes.get(i, b"") for i in ids).decode("utf-8", errors="replace")

    def stream(self):
        """A decoder for the ids of one sequence, as they come."""
        return StreamDecoder(self._bytes)


class StreamDecoder:
    """What push returns, and flush at the end, adds up to Tokenizer.decode of the same ids."""

    def __init__(self, bytes_of):
        self._bytes, self._utf8 = bytes_of, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id):
        """The characters that this token completes, maybe none: a token may end inside a character."""
        return self._utf8.decode(self._bytes.get(token_id, b""))

    def flush(self):
        """U+FFFD if the sequence ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def _finder(tokens):
    """Regex whose split() puts the tokens at odd places; of two at the same place the longer one wins."""
    return re.compile("(%s)" % ("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"))


@contextmanager
def _reading(path):
    try:
        yield
    except (AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise UserError(f"{path}: unreadable or broken ({error!r}); expected the file as published: fetch it "
                        "again (a Git LFS pointer is not enough)") from None


def _read_json(path, optional=False):
    if optional and not path.exists():
        return {}
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _meta_vocabulary(path, content):
    if content.startswith(b"\n"):  # the tag of the protobuf's first field
        raise UserError(f"{path}: SentencePiece (Llama 2) is not supported; "
                        "expected byte-level BPE: use a checkpoint such as Llama 3 or SmolLM2")
    lines = [line.split() for line in content.splitlines() if line]
    bytes_of = {int(rank): base64.b64decode(token, validate=True) for token, rank in lines}
    ranked = [(bytes_of[rank], rank) for rank in range(len(lines))]
    if {token for token, _ in ranked if len(token) == 1} != {bytes([byte]) for byte in range(256)}:
        raise ValueError("not every byte is a token")
    added = {token: len(ranked) + i for i, token in enumerate(LLAMA3_SPECIAL_TOKENS)}
    return Vocabulary(LLAMA3_REGEX, ranked, bytes_of, added, set(added), [added["<|begin_of_text|>"]])


def _hf_vocabulary(path, spec):
    def require(condition, what):
        if not condition:
            raise UserError(f"{path}: {what} is not supported (ids would be wrong); expected byte-level BPE: "
                            "use a checkpoint such as Llama 3 or SmolLM2")

    model, normalizer = spec["model"], spec.get("normalizer") or {"normalizers": []}
    require(model.get("type", "BPE") == "BPE", f"a {model.get('type')} model")
    require(not model.get("byte_fallback"), "SentencePiece (Llama 2: byte_fallback)")
    for option in "dropout", "continuing_subword_prefix", "end_of_word_suffix":
        require(not model.get(option), f"the model's {option}")
    require(normalizer.get("normalizers") == [], f"the normalizer {normalizer.get('type')}")
    regex = _hf_regex(spec.get("pre_tokenizer") or {"type": "null"}, require)

    tokens = spec.get("added_tokens", [])
    added = {token["content"]: token["id"] for token in tokens}
    special = {token["content"] for token in tokens if token["special"]}
    for token, option in product(tokens, ("lstrip", "rstrip", "single_word")):
        require(not token[option], f"{option} of the added token {token['content']!r}")

    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    merged = {left + right for left, right in pairs}
    vocab = {token: i for token, i in model["vocab"].items() if token in merged or token not in added}
    order = _merge_order(pairs, vocab, model.get("ignore_merges"))
    require(order is not None, "ignore_merges with an incomplete list of merges")
    require(not model.get("unk_token") or vocab.keys() >= BYTE_OF_CHAR.keys(), "an unknown token")
    bytes_of = {i: bytes(BYTE_OF_CHAR[char] for char in token) for token, i in vocab.items()}
    # A byte that is no token (SmolLM2 lacks some of unassigned code points) is left out of the ids, as in HF.
    ranked = [(bytes([byte]), vocab.get(char, -1)) for char, byte in BYTE_OF_CHAR.items()]
    ranked += [(bytes_of[vocab[token]], vocab[token]) for token in order]

    prefix, processor = [], spec.get("post_processor") or {"type": "ByteLevel"}
    for step in processor["processors"] if processor["type"] == "Sequence" else [processor]:
        require(step["type"] in ("ByteLevel", "TemplateProcessing"), f"the post-processor {step['type']}")
        # what a template appends to the text (EOS) is left out: a prompt is there to be continued
        for item in takewhile(lambda item: "SpecialToken" in item, step.get("single", [])):
            prefix += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return Vocabulary(regex, ranked, bytes_of, added, special, prefix)


def _hf_regex(pre_tokenizer, require):
    """One regex for a pre-tokenizer that is ByteLevel, alone or after one Digits or Split."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    match [{"use_regex": True, **step} for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_REGEX
        case [{"type": "Digits", "individual_digits": single},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return DIGITS_REGEX % (r"\p{N}" if single else r"\p{N}+")
        case [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return rf"{regex}|(?:(?!{regex})[\s\S])+"  # what lies between two matches is a piece as well
    require(False, f"the pre-tokenizer {' + '.join(step['type'] for step in steps)} with its options")


def _merge_order(pairs, vocab, ignore_merges):
    """Tokens made by the merges, by priority, so that tiktoken encodes as HF does; None if it wouldn't.

    HF merges neighbours that are listed as a pair. tiktoken merges neighbours whose concatenation is a token,
    and takes a piece that is a token as a whole. They agree if every token is reached by merging its bytes:
    inside any text these merge as they do alone, so no other two neighbours ever add up to it. A token that
    isn't reached never comes out of HF and is left out here. With ignore_merges HF takes whole pieces too; if
    every split of every token is listed, as by the converter from tiktoken files, that is tiktoken's rule.
    """
    rank_of = {pair: rank for rank, pair in enumerate(pairs)}
    order = [token for token, _ in groupby(left + right for left, right in pairs)]
    if ignore_merges and len(order) == len(set(order)) and all(
            (token[:i], token[i:]) in rank_of or token[:i] not in vocab or token[i:] not in vocab
            for token in vocab for i in range(1, len(token))):
        return list(dict.fromkeys([*order, *(token for token in vocab if len(token) > 1)]))

    def last_merge(token):
        """Rank of the last of the merges that make the token out of its bytes, None if they don't."""
        symbols, rank = list(token), None
        while len(symbols) > 1:
            ranks = [rank_of.get(pair, len(pairs)) for pair in pairwise(symbols)]
            rank = min(ranks)
            if rank == len(pairs):
                return None
            i = ranks.index(rank)
            symbols[i:i + 2] = [symbols[i] + symbols[i + 1]]
        return rank

    made = {token: rank for token in set(order) if (rank := last_merge(token)) is not None}
    lost = any(len(token) > 1 and token not in made for token in vocab)
    return None if ignore_merges and lost else sorted(made, key=made.get)
