"""Learn a byte-level BPE vocabulary and write it as a tokenizer.json on which all readers agree."""
import json
import re
from collections import Counter, defaultdict

from tokenizer import BYTE_OF_CHAR

END_OF_TEXT = "<|endoftext|>"   # id 0
# GPT-2's pre-tokenizer for ASCII text, in the standard library's dialect
ASCII_GPT2 = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def merges_of(words, count):
    """Byte-pair encoding (Sennrich et al. 2016): the merges for `count` new pieces, most frequent pair first.

    words: {word, spelled in the printable characters that stand for its bytes: frequency}.
    """
    pieces = [(list(word), n) for word, n in words.items()]
    pairs, where = Counter(), defaultdict(set)
    for i, (word, n) in enumerate(pieces):
        for pair in zip(word, word[1:]):
            pairs[pair] += n
            where[pair].add(i)
    merges, made = [], set()
    while len(made) < count and pairs:
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        if pairs[best] <= 0:
            break
        merges.append(best)
        made.add(best[0] + best[1])
        for i in where.pop(best):
            word, n = pieces[i]
            for pair in zip(word, word[1:]):
                pairs[pair] -= n
            at, merged = 0, []
            while at < len(word):
                both = tuple(word[at:at + 2]) == best
                merged.append(word[at] + word[at + 1] if both else word[at])
                at += 1 + both
            word[:] = merged
            for pair in zip(word, word[1:]):
                pairs[pair] += n
                where[pair].add(i)
        pairs.pop(best, None)
    return merges


def save_tokenizer(texts, vocab_size, folder):
    """Byte-level BPE with GPT-2's pre-tokenizer, as tokenizer.json; id 0 is <|endoftext|>. texts: ASCII."""
    char = {byte: char for char, byte in BYTE_OF_CHAR.items()}
    counts = Counter(word for text in texts for word in ASCII_GPT2.findall(text))
    words = {"".join(char[byte] for byte in word.encode()): n for word, n in counts.items()}
    merges = merges_of(words, vocab_size - 257)
    pieces = [END_OF_TEXT, *(char[byte] for byte in range(256)), *dict.fromkeys(a + b for a, b in merges)]
    end = {"id": 0, "content": pieces[0], "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
           "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [f"{a} {b}" for a, b in merges]}
    folder.mkdir(parents=True, exist_ok=True)
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": [end], "normalizer": None,
             "pre_tokenizer": level, "post_processor": None, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": pieces[0], "clean_up_tokenization_spaces": False,
              "model_max_length": 1_000_000}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
