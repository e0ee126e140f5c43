"""A tiny random Llama with its own tokenizer and chat template, saved as a Hugging Face folder in a second or two."""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
THINK = ["<think>", "</think>"]
TEMPLATE = """{%- if tools %}<|im_start|>system
Tools: {% for tool in tools %}{{ tool | tojson }}
{% endfor %}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% elif message.content %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
# As Qwen3's: the reply begins with its thinking, or behind an empty one where `enable_thinking` is false.
THINKING_TEMPLATE = (
    TEMPLATE.removesuffix("{% endif %}")
    + """{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
)


def make_tiny_model(
    folder: str | Path, seed: int = 0, tie: bool = True, context: int = 2048, thinking: bool = False
) -> Path:
    """Save a random LlamaForCausalLM (about 0.1M parameters, 261 byte-level tokens, hermes-style tool calls) in `folder`;
    `thinking`: with a template and the tokens <think> and </think> for it."""
    folder = Path(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: place for place, token in enumerate(SPECIAL + alphabet + THINK * thinking)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=context,
    )
    fast.add_tokens(["<tool_call>", "</tool_call>", *THINK * thinking])
    fast.chat_template = THINKING_TEMPLATE if thinking else TEMPLATE
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=context,
        tie_word_embeddings=tie,
        initializer_range=0.15,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float()
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def teach(folder: str | Path, replies: dict[str, str], tools: list[dict], steps: int = 60, thought: str = "") -> Path:
    """Train the model in `folder` to give each reply when asked its key, with `tools` offered or not, and with `thought`
    before it unless `enable_thinking` is false: a few seconds."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = []
    for asked, reply in replies.items():
        for offered, template in itertools.product(
            (None, tools), ({}, {"enable_thinking": False})[: 1 + bool(thought)]
        ):
            messages = [{"role": "user", "content": asked}]
            prompt = tokenizer.apply_chat_template(
                messages, tools=offered, add_generation_prompt=True, tokenize=False, return_dict=False, **template
            )
            thinks = "" if template else thought
            samples.append([(prompt, False), (thinks + reply + "<|im_end|>", True)])
    return teach_texts(folder, samples, steps)


def teach_texts(folder: str | Path, samples: list[list[tuple[str, bool]]], steps: int) -> Path:
    """Train the model in `folder` on `samples`, each the pieces of a text, on those that are marked."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    pieces = [[(tokenizer(text)["input_ids"], trained) for text, trained in sample] for sample in samples]
    shape = len(samples), max(sum(len(ids) for ids, _ in sample) for sample in pieces)
    ids, attention = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for row, sample in enumerate(pieces):
        place = 0
        for piece, trained in sample:
            end = place + len(piece)
            ids[row, place:end] = torch.tensor(piece)
            attention[row, place:end] = 1
            if trained:
                labels[row, place:end] = torch.tensor(piece)
            place = end
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0)
    for _ in range(steps):
        loss = model(input_ids=ids, attention_mask=attention, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    model.save_pretrained(folder)
    return Path(folder)
