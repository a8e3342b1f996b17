"""A tokenizer, texts and the layouts of TRL's SFTTrainer."""

import transformers
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers


def tokenizer():
    words = [f"w{number}" for number in range(46)]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    built = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


SFT = {
    "padded": {},
    "packed": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "completion only": {"completion_only_loss": True},
}


def texts():
    """Prompts of 2 words with completions of 2 to 5."""
    pairs = [(f"w{n} w{n + 1}", "".join(f" w{n + k}" for k in range(2 + n % 4))) for n in range(24)]
    return Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in pairs])
