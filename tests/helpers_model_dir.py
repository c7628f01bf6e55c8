"""A tiny model directory with a tokenizer, as a user would have one."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qspec_llm.model.config import ModelConfig
from qspec_llm.model.load import expected_shapes

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}{% endfor %}"
    "<|assistant|>"
)


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer of 256 bytes, an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(path)


def write_model(path: Path, *, context: int = 256, seed: int = 0) -> None:
    """A random two-layer Llama over bytes."""
    values = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 272,  # bytes, an end token, and what fills a row block of the kernels
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context,
        "eos_token_id": 256,
        "tie_word_embeddings": False,
    }
    (path / "config.json").write_text(json.dumps(values))
    config = ModelConfig("llama", 272, 64, 96, 2, 4, 2, 16, 1e-5, 1e4, None, False, context, (256,))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).mul_(0.3).to(torch.bfloat16)
        for name, shape in expected_shapes(config).items()
    }
    save_file(tensors, path / "model.safetensors")
    write_tokenizer(path)
