"""A tokenizer of transformers as the fields of a GGUF file."""

import itertools
import json

# How a text is cut before byte pairs are merged, and llama.cpp's name for that.
LLAMA_3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
           r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PRE = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", LLAMA_3, "Isolated", False), ("ByteLevel", False)): "llama-bpe",
    (("Split", LLAMA_3.replace("{1,3}", ""), "Isolated", False), ("ByteLevel", False)): "qwen2",
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5         # gguf.TokenType


def tokenizer_fields(writer, tokenizer, rows: int) -> None:
    """Give `writer`, a gguf.GGUFWriter, the byte-level BPE tokenizer of a model.

    `rows` is the number of the embedding's rows. Raises ValueError for a tokenizer of another
    kind, or one that llama.cpp would not follow to the letter.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"a {type(tokenizer).__name__} is no fast tokenizer of transformers")
    data = json.loads(backend.to_str())
    model = data["model"]
    pre = _pre(data)
    if pre is None or bool(model.get("ignore_merges")) != (pre == "llama-bpe"):
        raise ValueError("save_gguf writes byte-level BPE tokenizers that cut a text as GPT-2, "
                         "SmolLM, Llama 3 or Qwen 2 do, got "
                         f"model {model['type']}, ignore_merges {model.get('ignore_merges')}, "
                         f"normalizer {data['normalizer']}, pre_tokenizer {data['pre_tokenizer']}")
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    if max(vocabulary.values()) >= rows:
        raise ValueError(f"the tokenizer knows token {max(vocabulary.values())}, and the embedding "
                         f"has {rows} rows")
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(f"the added token {token!r} takes its surroundings into account, "
                             "which llama.cpp would not")
    tokens, types = [f"[UNUSED{i}]" for i in range(rows)], [UNUSED] * rows
    for token, i in vocabulary.items():
        tokens[i], types[i] = token, NORMAL
    for i, token in added.items():
        types[i] = CONTROL if token.special else USER_DEFINED
    begins, ends = _around(tokenizer)
    writer.add_tokenizer_model("gpt2")                   # byte-level BPE, whoever made it
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    for role in ("bos", "eos", "unk", "pad"):
        if (i := getattr(tokenizer, f"{role}_token_id")) is not None:
            getattr(writer, f"add_{role}_token_id")(i)
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _pre(data):
    """llama.cpp's name for the way in which a text is cut, or None."""
    normalizer, steps = data["normalizer"], data["pre_tokenizer"]
    if data["model"]["type"] != "BPE" or data["model"].get("byte_fallback") or not steps:
        return None
    steps = steps["pretokenizers"] if steps["type"] == "Sequence" else [steps]
    if any(step.get("add_prefix_space") for step in steps):
        return None
    keys = {"ByteLevel": ("use_regex",), "Digits": ("individual_digits",),
            "Split": ("pattern", "behavior", "invert")}
    cuts = tuple((step["type"], *(step[key] for key in keys.get(step["type"], ())))
                 for step in ({**s, "pattern": s.get("pattern", {}).get("Regex")} for s in steps))
    pre = PRE.get(cuts)
    # Qwen composes accents first (NFC), and llama.cpp does not: most texts have them so already.
    return pre if normalizer is None or (pre == "qwen2" and normalizer == {"type": "NFC"}) else None


def _around(tokenizer):
    """Whether the tokenizer puts its begin mark before, and its end mark after, every text."""
    whole = tokenizer("a").input_ids
    bare = tokenizer("a", add_special_tokens=False).input_ids
    for begins, ends in itertools.product((False, True), repeat=2):
        if whole == [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
            return begins, ends
    raise ValueError(f"the tokenizer makes {whole} of a text that is {bare}: llama.cpp can add a "
                     "begin mark and an end mark, and nothing else")
