import json
from pathlib import Path

import torch

from nanochat.gpt import GPT, GPTConfig


def save_checkpoint(checkpoint_dir, step, model_data, optimizer_data, meta_data, rank=0):
    Path(checkpoint_dir).mkdir(parents=True, exist_ok=True)
    torch.save(model_data, Path(checkpoint_dir) / f"model_{step:06d}.pt")
    (Path(checkpoint_dir) / f"meta_{step:06d}.json").write_text(json.dumps(meta_data))


def load_checkpoint(checkpoint_dir, step, device, load_optimizer=False, rank=0):
    meta_data = json.loads((Path(checkpoint_dir) / f"meta_{step:06d}.json").read_text())
    return torch.load(Path(checkpoint_dir) / f"model_{step:06d}.pt", map_location=device), None, meta_data


def build_model(checkpoint_dir, step, device):
    model_data, _, meta_data = load_checkpoint(checkpoint_dir, step, device)
    with torch.device("meta"):
        model = GPT(GPTConfig(**meta_data["model_config"]))
    model.to_empty(device=device)
    model.init_weights()
    model.load_state_dict(model_data, strict=True, assign=True)
    return model, meta_data
