"""What the tuning tests share: a tokenizer of bytes, random models of many kinds, a few pairs."""

import torch

PAIRS = [("Say red", "A rose."), ("Say blue", "The sky is."), ("Say green", "Grass"),
         ("Say white", "Snow in May.")]
CHAT = ("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}")


def byte_tokenizer(template=CHAT, marks=("<end>",), **options):
    """One token for each byte, and an end mark; `marks` come first and are one token each."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({c: i for i, c in enumerate([*marks, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", **options)
    tokenizer.chat_template = template
    return tokenizer


def causal(kind="llama", dtype=torch.float32, std=0.4, **options):
    """A model of transformers with random weights, the same at every call."""
    import transformers as t
    sizes = {"vocab_size": 257, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    wide = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    small = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = {"llama": (t.LlamaConfig, wide), "qwen2": (t.Qwen2Config, wide),
              "gpt2": (t.GPT2Config, small | still), "gpt2 with dropout": (t.GPT2Config, small),
              "phi": (t.PhiConfig, wide | {"tie_word_embeddings": False}),   # a bias in the head
              "gemma2": (t.Gemma2Config, wide | {"head_dim": 8}),
              "cohere": (t.CohereConfig, wide)}[kind]
    config = config[0](**(sizes | config[1] | options))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = t.AutoModelForCausalLM.from_config(config).to(dtype).eval()
        for p in model.parameters():
            if p.ndim > 1 or kind == "phi":
                torch.nn.init.normal_(p, std=std)
    return model
