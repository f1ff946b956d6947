"""Finished directories of chat models: tokenizers trained here, templates as they are published.

``make`` writes one; the rest of the module is what it can be made of. The weights are the embedding
alone, as nothing here reads more of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ROWS = 320
TEXT = [
    "a checkpoint is a copy of a training run",
    "the quick brown fox jumps over the lazy dog",
] * 9


class Chat(NamedTuple):
    """How a family of models writes a conversation.

    Attributes:
        template: its chat template, in the form in which it is published, cut to what matters.
        specials: its special tokens, in the order of their ids.
        closing: the token that closes an assistant's turn.
        ends: the tokens of ``eos_token_id`` of the published models.
        named: the tokens that the tokenizer names.
    """

    template: str
    specials: tuple[str, ...]
    closing: str
    ends: tuple[str, ...]
    named: dict[str, str]


CHATML = Chat(
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}",
    ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "<|im_end|>",
    ("<|im_end|>", "<|endoftext|>"),
    {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
)
QWEN3 = CHATML._replace(
    template="{% for message in messages %}{% if message.role == 'assistant' %}"
    "{% set content = message.content.split('</think>')[-1].lstrip('\n') %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}"
)
LLAMA3 = Chat(
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] +"
    " '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif %}",
    (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    ),
    "<|eot_id|>",
    ("<|end_of_text|>", "<|eot_id|>"),
    {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
)
GEMMA = Chat(
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}",
    ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    "<end_of_turn>",
    ("<eos>", "<end_of_turn>"),
    {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"},
)
MISTRAL = Chat(
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ message['content'] + eos_token }}{% endif %}{% endfor %}",
    ("<s>", "</s>"),
    "</s>",
    ("</s>",),
    {"bos_token": "<s>", "eos_token": "</s>"},
)
# Only the last turn is closed by a token; the tags of the roles are text.
TULU = Chat(
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + '\n' }}{% elif message['role'] == 'assistant' %}"
    "{% if not loop.last %}{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}"
    "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% endif %}{% endfor %}",
    ("<|endoftext|>",),
    "<|endoftext|>",
    ("<|endoftext|>",),
    {"eos_token": "<|endoftext|>"},
)
PHI3 = Chat(
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + '\n' + message['content'] +"
    " '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}"
    "{{ eos_token }}{% endif %}",
    ("<s>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"),
    "<|end|>",
    ("<|endoftext|>", "<|assistant|>", "<|end|>"),
    {"bos_token": "<s>", "eos_token": "<|endoftext|>"},
)
# A finished answer is returned; one that is followed by others is ended.
HARMONY = Chat(
    "{{ '<|start|>system<|message|>Date: ' + strftime_now('%Y-%m-%d') + '<|end|>' }}"
    "{% for message in messages %}{{ '<|start|>' + message.role + '<|message|>' + message.content }}"
    "{% if message.role == 'assistant' and loop.last %}{{ '<|return|>' }}{% else %}{{ '<|end|>' }}"
    "{% endif %}{% endfor %}",
    (
        "<|startoftext|>",
        "<|endoftext|>",
        "<|return|>",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|call|>",
    ),
    "<|return|>",
    ("<|return|>", "<|endoftext|>", "<|call|>"),
    {"eos_token": "<|return|>", "pad_token": "<|endoftext|>"},
)
# The model stops at the token that opens the next turn.
GLM = Chat(
    "[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}"
    "{% endfor %}",
    (
        "<|endoftext|>",
        "[gMASK]",
        "<sop>",
        "<|system|>",
        "<|user|>",
        "<|assistant|>",
        "<|observation|>",
    ),
    "<|user|>",
    ("<|endoftext|>", "<|user|>", "<|observation|>"),
    {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)
# Content comes in parts, as for a model that is shown images.
IN_PARTS = CHATML._replace(
    template="{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
)
WITH_SYSTEM = CHATML._replace(
    template="{% if messages[0]['role'] != 'system' %}{{ raise_exception('System first') }}{% endif %}"
    + CHATML.template
)
OLMO3 = CHATML._replace(
    template="{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' +"
    " message['content'] }}{%- if not loop.last %}{{- '<|im_end|>' + '\n' }}{%- else %}"
    "{{- eos_token }}{%- endif %}{%- endfor %}",
    closing="<|endoftext|>",
    named={"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
)
CHATS = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "tulu": TULU,
    "phi3": PHI3,
    "harmony": HARMONY,
    "glm": GLM,
    "parts": IN_PARTS,
    "system": WITH_SYSTEM,
    "olmo3": OLMO3,
}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": ROWS,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "float32",
}
OLMO = {**LLAMA, "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"}


def write(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file, or take them away where the value is None."""
    held = {**(read(path) if path.exists() else {}), **values}
    write(path, {key: value for key, value in held.items() if value is not None})


def write_tokenizer(directory: Path, chat: Chat, *, special: bool = True) -> dict[str, int]:
    """Train a byte-level BPE tokenizer of 300 tokens and save it; returns the ids of its tokens."""
    from transformers import PreTrainedTokenizerFast

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(chat.specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    fast.train_from_iterator(TEXT, trainer)
    fast_class: Any = PreTrainedTokenizerFast
    tokenizer = fast_class(tokenizer_object=fast, **chat.named)
    tokenizer.chat_template = chat.template or None
    tokenizer.save_pretrained(directory)
    if not special:
        held = read(directory / "tokenizer.json")
        for token in held["added_tokens"]:
            token["special"] = False
        write(directory / "tokenizer.json", held)
    return dict(fast.get_vocab())


def make(
    directory: Path,
    chat: Chat | None = CHATML,
    *,
    config: dict[str, Any] = LLAMA,
    rows: int = ROWS,
    ends: tuple[str, ...] | None = None,
    special: bool = True,
) -> Path:
    """A directory with a config, a generation config, an embedding and a tokenizer.

    Args:
        directory: where; it is made.
        chat: the tokenizer and its template; None for a model without them.
        config: ``config.json``.
        rows: of the embedding.
        ends: the tokens of ``eos_token_id``; those of ``chat`` by default.
        special: whether the added tokens are marked as special.
    """
    directory.mkdir(parents=True)
    write(directory / "config.json", {**config, "vocab_size": rows})
    embedding = np.zeros((rows, config["hidden_size"]), dtype=np.float32)
    save_file(
        {"model.embed_tokens.weight": embedding},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )
    if chat is None:
        return directory
    ids = write_tokenizer(directory, chat, special=special)
    numbers = [ids[token] for token in (chat.ends if ends is None else ends)]
    write(directory / "generation_config.json", {"eos_token_id": numbers or None})
    return directory
