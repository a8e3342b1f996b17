"""Writes what the clients train on: a small Llama with a tokenizer of bytes, and rows of different lengths in each format."""

import json
import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROWS = [
    (f"How much is {n}{' and ten' * (n % 3)} and {n}?", f"It is {2 * n}{', I would say' * (n % 4)}.") for n in range(24)
]


def main(folder: Path) -> None:
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    names: dict[str, Any] = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=512, **names)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder / "model")
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.num_labels = 1  # of reward models
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")

    asked = [[{"role": "user", "content": question}] for question, _ in ROWS]
    answers = [[{"role": "assistant", "content": answer}] for _, answer in ROWS]
    others = [*answers[1:], answers[0]]
    formats: dict[str, list[dict[str, Any]]] = {
        "alpaca": [{"instruction": question, "input": "", "output": answer} for question, answer in ROWS],
        "messages": [{"messages": [*a, *b]} for a, b in zip(asked, answers, strict=True)],
        "prompts": [{"prompt": a} for a in asked],
        "pairs": [{"prompt": a, "chosen": b, "rejected": c} for a, b, c in zip(asked, answers, others, strict=True)],
        "judged": [
            {"prompt": a, "completion": b, "label": n % 2 == 0}
            for n, (a, b) in enumerate(zip(asked, answers, strict=True))
        ],
    }
    for name, rows in formats.items():
        (folder / name).mkdir(exist_ok=True)
        for split in ("train", "test"):
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    info = {"tiny": {"file_name": "train.jsonl"}}
    (folder / "alpaca" / "dataset_info.json").write_text(json.dumps(info))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
