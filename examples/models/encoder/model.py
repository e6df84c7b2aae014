"""BERT (Devlin et al., 2018, arXiv:1810.04805) without the package transformers, from a directory in its layout.

Parameters are called as in its checkpoints, e.g. encoder.layer.0.attention.self.query.weight.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

#: What config.json calls activations.
ACTIVATIONS = {"gelu": nn.GELU(), "gelu_new": nn.GELU(approximate="tanh"), "relu": nn.ReLU(), "silu": nn.SiLU()}

Config = dict[str, Any]


class Embeddings(nn.Module):
    """The sum of what a token is, where it stands and which sentence it belongs to."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.word_embeddings = nn.Embedding(config["vocab_size"], size)
        self.position_embeddings = nn.Embedding(config["max_position_embeddings"], size)
        self.token_type_embeddings = nn.Embedding(config["type_vocab_size"], size)
        self.LayerNorm = nn.LayerNorm(size, config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, words: torch.Tensor, types: torch.Tensor) -> torch.Tensor:
        """words: [batch, seq, hidden]; types: [batch, seq]."""
        positions = self.position_embeddings(torch.arange(words.shape[1], device=words.device))
        return self.dropout(self.LayerNorm(words + self.token_type_embeddings(types) + positions))


class SelfAttention(nn.Module):
    """Every token's mixture of what the others tell, in several heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.heads = config["num_attention_heads"]
        self.query, self.key, self.value = nn.Linear(size, size), nn.Linear(size, size), nn.Linear(size, size)
        self.dropout = nn.Dropout(config["attention_probs_dropout_prob"])

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """x: [batch, seq, hidden]; bias: [batch, 1, 1, seq], added to the scores."""
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        # Written out: the fused kernels of scaled_dot_product_attention have no second derivative.
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
        return (self.dropout(scores.softmax(-1)) @ v).transpose(1, 2).flatten(-2)


class Output(nn.Module):
    """A linear layer, added to what went in, normalised."""

    def __init__(self, config: Config, given: int) -> None:
        super().__init__()
        self.dense = nn.Linear(given, config["hidden_size"])
        self.LayerNorm = nn.LayerNorm(config["hidden_size"], config["layer_norm_eps"])
        self.dropout = nn.Dropout(config["hidden_dropout_prob"])

    def forward(self, x: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + before)


class Layer(nn.Module):
    """Attention, then two linear layers for each token."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = nn.ModuleDict({"self": SelfAttention(config), "output": Output(config, size)})
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(size, inner)})
        self.output = Output(config, inner)
        self.activation = ACTIVATIONS[config["hidden_act"]]

    def forward(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        x = self.attention["output"](self.attention["self"](x, bias), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class Bert(nn.Module):
    """The encoder with its pooler, as transformers.BertModel."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        size = config["hidden_size"]
        self.embeddings = Embeddings(config)
        layers = nn.ModuleList([Layer(config) for _ in range(config["num_hidden_layers"])])
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(size, size)})

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        offset: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """What the tokens mean where they stand.

        input_ids: [batch, seq]. attention_mask: [batch, seq], 0 for padding. token_type_ids: [batch, seq]; None: 0.
        offset: [batch, seq, hidden], added to the tokens' embeddings. Integers have no gradient; the gradient by an
            offset of zeros is that by the embeddings, which tells what each token contributes.

        Returns last_hidden_state [batch, seq, hidden], pooler_output [batch, hidden], and word_embeddings
        [batch, seq, hidden]: those of the tokens, from which offsets are measured.
        """
        embedded = self.embeddings.word_embeddings(input_ids)
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        x = self.embeddings(embedded if offset is None else embedded + offset, types)
        # The most negative number there is, not -inf: a row that is padding alone must not become NaN.
        bias = (1 - attention_mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.encoder["layer"]:
            x = layer(x, bias)
        pooled = self.pooler["dense"](x[:, 0]).tanh()
        return {"last_hidden_state": x, "pooler_output": pooled, "word_embeddings": embedded}


def from_pretrained(checkpoint: str = "") -> Bert:
    """The model in a directory, by default the one that this file was staged to.

    Of checkpoints with heads (BertForMaskedLM and the like), the heads are left out.
    """
    directory = Path(__file__).parent / checkpoint
    config = json.loads((directory / "config.json").read_text())
    if config.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"position_embedding_type is {config['position_embedding_type']!r}, expected 'absolute'")
    found = load_file(directory / "model.safetensors")
    with torch.device("meta"):
        model = Bert(config)
    if any(name.startswith("bert.") for name in found):
        found = {name.removeprefix("bert."): one for name, one in found.items() if name.startswith("bert.")}
    # What old checkpoints have besides: a buffer that counts from 0, and other names for the norms.
    found.pop("embeddings.position_ids", None)
    renamed = {
        name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias"): found[name] for name in found
    }
    # Each worker maps the file and gets its tensors as they are; nothing is made first to be overwritten.
    model.load_state_dict(renamed, assign=True)
    return model
