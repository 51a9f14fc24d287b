"""Four dozen sentences of sixteen words, and a tokenizer of those words, made in memory."""

from functools import cache

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast


ANIMALS, ACTS, PLACES = (
    ["cat", "dog", "owl", "fox"],
    ["sleeps", "runs", "sings"],
    ["here", "there", "outside", "alone"],
)
SENTENCES = [f"the {animal} {act} {place}" for animal in ANIMALS for act in ACTS for place in PLACES]
KINDS = [index % 3 for index in range(len(SENTENCES))]
SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "mask_token": "<mask>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
}


@cache
def tokenizer(pair: bool = False) -> PreTrainedTokenizerFast:
    """One token for each word of `SENTENCES`; with `pair`, texts are framed as BERT's are."""
    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(SENTENCES, trainers.WordLevelTrainer(special_tokens=list(SPECIAL_TOKENS.values())))
    if pair:
        ends = [(token, words.token_to_id(token)) for token in ("<cls>", "<sep>")]
        words.post_processor = processors.TemplateProcessing(
            single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=ends
        )
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **SPECIAL_TOKENS)


def special_ids() -> dict[str, int]:
    """The tokenizer's special tokens, as a model's configuration wants them."""
    return {name: getattr(tokenizer(), name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}


def token_ids(*texts: str) -> torch.Tensor:
    """A batch of texts of equally many words, of shape `(len(texts), words)`."""
    return torch.tensor(tokenizer()(list(texts))["input_ids"])
