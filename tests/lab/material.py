"""A small model and some text to train it on, made here."""

import sysconfig
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    ByT5Tokenizer,
    GPT2Config,
    PreTrainedTokenizerFast,
    logging,
)

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


SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 64, "vocab_size": 384}
SIZES |= {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}


def make_of_kind(folder, kind, **more):
    """Write a small model of an architecture, and return the flags of a run that starts from it.

    At its weights a first loss depends on every layer, also on biases and norms: those that a model
    begins with are too small, or 0, or 1.
    """
    config = CONFIG_MAPPING[kind](**SIZES | more)
    if getattr(config, "head_dim", None):
        config.head_dim = 12
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    if kind == "llama":
        ByT5Tokenizer().save_pretrained(folder)
    else:  # others want tokenizers of their own kinds, and take any with such a file
        words = {bytes([i]).decode("latin1"): i for i in range(256)}
        bytes_only = Tokenizer(BPE(words | {"<unk>": 256, "</s>": 257}, [], unk_token="<unk>"))
        names = {"unk_token": "<unk>", "eos_token": "</s>"}
        PreTrainedTokenizerFast(tokenizer_object=bytes_only, **names).save_pretrained(folder)
    return ["-m", folder, "--pretrained"]
