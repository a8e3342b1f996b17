"""How strong NEFTune's noise is against the embeddings of well-known models: ``python -m experiments.ratios [FOLDER ...]``.

Writes the table of docs/alpha.md. A model is built from the configuration that its class in transformers has by default, which
is the published one of the model that the class was made for. Only the embeddings keep their size, and their initial scale is
that of the configuration. Of a FOLDER with a checkpoint the trained embeddings are used.
"""

import argparse
import re
from pathlib import Path

import torch
import transformers

from neft_kernels import describe, replace_embeddings

DOCS = Path(__file__).resolve().parent.parent / "docs" / "alpha.md"
ALPHA, LENGTHS, ROWS = 5.0, (128, 512, 2048), 8

#: By the name of its class in transformers: the model whose published configuration is the default.
MODELS = {
    "LlamaForCausalLM": "LLaMA 7B",
    "MistralForCausalLM": "Mistral 7B",
    "GemmaForCausalLM": "Gemma 7B, whose embeddings are scaled by sqrt(d)",
    "Gemma2ForCausalLM": "Gemma 2 2B, scaled by sqrt(d)",
    "GPT2LMHeadModel": "GPT-2",
    "OPTForCausalLM": "OPT 125M",
    "GPTNeoXForCausalLM": "GPT-NeoX 20B",
    "BertModel": "BERT base",
    "BartForConditionalGeneration": "BART large",
    "T5ForConditionalGeneration": "T5 small",
}
#: What a configuration calls its number of layers, and what makes no difference to the embeddings and much to the memory.
SMALL = {
    "num_hidden_layers": 1,
    "n_layer": 1,
    "num_layers": 1,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "intermediate_size": 8,
    "ffn_dim": 8,
    "vocab_size": 4096,
    "pad_token_id": None,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="*", help="a checkpoint whose embeddings are measured too")
    rows = []
    for folder in parser.parse_args().folder:
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
        name = re.sub(r"-[\d.]+$", "", Path(folder).name)  # without a version
        rows.append((f"{name}, trained", *strengths(model)))
    for class_name, title in MODELS.items():
        model_class = getattr(transformers, class_name)
        config = model_class.config_class()
        for name, value in SMALL.items():
            if hasattr(config, name):
                setattr(config, name, value)
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:1]
        torch.manual_seed(0)
        rows.append((f"{title}, initial", *strengths(model_class(config))))
        print(rows[-1], flush=True)
    head = ["model", "width", "rms of the embeddings", *(f"{length} tokens" for length in LENGTHS)]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    begin, end = "<!-- ratios -->\n", "<!-- /ratios -->"
    DOCS.write_text(re.sub(f"{begin}.*?{end}", begin + table + "\n" + end, DOCS.read_text(), flags=re.DOTALL))


def strengths(model: transformers.PreTrainedModel) -> tuple[str, ...]:
    """The width, the root mean square of the embeddings, and the ratio of the noise to them at each length."""
    replace_embeddings(model.train(), ALPHA)
    embedding = model.get_input_embeddings()
    rows, width = embedding.state_dict()["weight"].shape
    ids = torch.randint(4, rows, (ROWS, max(LENGTHS)))
    ratios = []
    for length in LENGTHS:
        replace_embeddings(model, ALPHA)  # which forgets the last batch
        embedding(ids[:, :length])
        ratios += [each.ratio for each in describe(model) if each.ratio is not None]
    rms = ALPHA / (max(LENGTHS) * width * 3) ** 0.5 / ratios[-1]
    return str(width), f"{rms:.2g}", *(f"{ratio:.2g}" for ratio in ratios)


if __name__ == "__main__":
    main()
