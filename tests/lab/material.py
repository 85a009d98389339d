"""A small model and some text to train it on, made here."""

import sysconfig
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, ByT5Tokenizer, GPT2Config, LlamaConfig, logging

logging.disable_progress_bar()


def source_code(documents):
    """Return documents of 1000 characters: sources of some packages of the standard library."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    whole = "".join(
        path.read_text()
        for name in ("json", "email")
        for path in sorted((stdlib / name).glob("*.py"))
    )
    return [whole[i * 1000 : (i + 1) * 1000] for i in range(documents)]


def make_model(folder, dropout, width=48):
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=64,
        n_embd=width,
        n_layer=2,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=1,
        eos_token_id=1,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_llama(folder):
    """Make one with grouped heads, tied embedding and head, and weights at which a first loss
    depends on every layer: those that a model begins with are too small."""
    tokenizer = ByT5Tokenizer()
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    words = {"vocab_size": len(tokenizer), "eos_token_id": 1, "bos_token_id": 1}
    config = LlamaConfig(**sizes, **words, tie_word_embeddings=True)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
