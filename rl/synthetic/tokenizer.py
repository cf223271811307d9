"""The demo's tokenizer: every word of the generated documents is one token, and any text survives the round trip.

A byte-level BPE whose merges are never needed: words that occur in the training documents are in the vocabulary whole
(`ignore_merges`, as in Llama 3), and whatever is not falls apart into bytes. A word carries its leading space.
It gives up subwords: an unseen word costs as many tokens as it has bytes.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

EOS, PAD = "<eos>", "<pad>"
EOS_ID, PAD_ID = 0, 1
WORDS = r" ?\w+| ?[^\w\s]+|\n+| +"
LONGEST_CONTEXT = 4096
FORM = (
    "Please read the following text and answer the question below.\n\n<text>\n\n</text>\n\n"
    'Format your response as follows: "Therefore, the answer is (insert answer here)".'
)
"""The words of the question template, one token each: a prompt is then about 55 tokens longer than its document."""


def build_tokenizer(texts: Iterable[str], numbers: Iterable[int]) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of `texts`, and `numbers` with and without a leading space."""
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    counter = Tokenizer(models.WordLevel(unk_token=None))
    counter.pre_tokenizer = split
    counter.train_from_iterator([FORM, *texts], trainers.WordLevelTrainer(vocab_size=1 << 20, show_progress=False))
    words = set(counter.get_vocab()) | {f"Ġ{number}" for number in numbers}
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [EOS, PAD, *alphabet, *sorted(words - set(alphabet))]
    model = models.BPE(vocab={word: i for i, word in enumerate(vocabulary)}, merges=[], ignore_merges=True)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=LONGEST_CONTEXT,
        clean_up_tokenization_spaces=False,
    )
