"""A tokenizer trained here on our own filler: about as many tokens a word as a real policy's."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from longreach.rl.prompts import TEMPLATE
from longreach.rl.synthetic.lexicon import FILLERS

CHAT = (
    "{{ '<|bos|>' }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]


def make(chat: bool) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([TEMPLATE, *FILLERS, "The access code of the crooked anchor is 7310942."] * 3, trainer)
    core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64)
    tokenizer.chat_template = CHAT if chat else None
    return tokenizer


@pytest.fixture(scope="session")
def bare() -> PreTrainedTokenizerFast:
    return make(chat=False)


@pytest.fixture(scope="session")
def chatty() -> PreTrainedTokenizerFast:
    return make(chat=True)
