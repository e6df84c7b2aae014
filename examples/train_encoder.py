"""Makes the checkpoint of examples/models/encoder: a tiny BERT that guesses letters of LICENSE which were masked.

In this process, with torch, in a minute or two; what matters here is the file that comes out, in Hugging Face's layout.
A token is an ASCII character, its id the code; 0 is the mask. Run: .venv/bin/python examples/train_encoder.py
"""

import argparse
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save
from tqdm import tqdm

HERE = Path(__file__).parent
STEPS, BATCH, LENGTH, MASK, SHARE, RATE = 4500, 32, 32, 0, 0.15, 2e-3
CONFIG = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 128,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_act": "gelu",
    "max_position_embeddings": LENGTH,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
    "pad_token_id": 0,
}


def load(path: Path) -> ModuleType:
    """A file as a module."""
    found = importlib.util.spec_from_file_location("encoder", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def windows(text: torch.Tensor, count: int) -> torch.Tensor:
    """Random pieces of a text, [count, LENGTH]."""
    starts = torch.randint(len(text) - LENGTH + 1, (count, 1))
    return text[starts + torch.arange(LENGTH)]


def guess(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits for letters that were masked, [n, vocabulary], by their likeness to the embeddings; and the letters."""
    masked = torch.rand(ids.shape) < SHARE
    hidden = model(ids.masked_fill(masked, MASK), torch.ones_like(ids))["last_hidden_state"][masked]
    return hidden @ model.embeddings.word_embeddings.weight.T, ids[masked]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--out", type=Path, default=HERE / "models" / "encoder" / "1")
    out: Path = arguments.parse_args().out
    torch.set_num_threads(1)
    torch.manual_seed(0)
    text = torch.tensor([*(HERE.parent / "LICENSE").read_text().encode("ascii", "replace")])
    split = len(text) * 9 // 10
    model = load(HERE / "models" / "encoder" / "model.py").Bert(CONFIG)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=CONFIG["initializer_range"])
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, STEPS)
    for _ in tqdm(range(STEPS), unit="step"):
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(*guess(model, windows(text[:split], BATCH))).backward()
        optimiser.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        logits, letters = guess(model, windows(text[split:], 500))
    right = float((logits.argmax(1) == letters).float().mean())
    usual = float((letters == text[:split].mode().values).float().mean())
    print(f"{right:.1%} of masked letters in text not seen are guessed right; always the most frequent: {usual:.1%}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    # transformers wants to be told who wrote it.
    size = (out / "model.safetensors").write_bytes(save(model.state_dict(), {"format": "pt"}))
    print(f"{out}: {size:,} bytes")
    if right < 2 * usual:
        raise SystemExit("it has learned nothing")


if __name__ == "__main__":
    main()
