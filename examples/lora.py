"""LoRA with PEFT: freeze a GPT-2 that counts up, and train adapters to count down: `python examples/lora.py`."""

import torch
from hf_gpt2 import gpt2
from peft import LoraConfig, PeftModel, get_peft_model
from synthetic import progressions
from torch import Tensor, nn

from relfisher import RNGD, AdamWOptions


def adapted(base: nn.Module, rank: int = 8) -> PeftModel:
    """Freeze the model, and return it with adapters on its attention and feed-forward layers."""
    torch.manual_seed(0)
    return get_peft_model(base, LoraConfig(r=rank, target_modules=["c_attn", "c_fc", "c_proj"], fan_in_fan_out=True))


def train(model: nn.Module, optimizer: RNGD, tokens: Tensor, *, epochs: int = 10, batch: int = 32) -> list[float]:
    """Train the model and return the loss of each step."""
    losses = []
    for _ in range(epochs):
        for chosen in tokens[torch.randperm(len(tokens))].split(batch):
            optimizer.zero_grad()
            loss = model(input_ids=chosen, labels=chosen).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


if __name__ == "__main__":
    base = gpt2()
    optimizer = RNGD(base, fallback=AdamWOptions(lr=1e-2))
    losses = train(base, optimizer, progressions(512, steps=(1,)))
    print(f"counting up, all weights: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    optimizer.close()
    model = adapted(base)
    model.print_trainable_parameters()
    losses = train(model, RNGD(model), progressions(512, steps=(-1,)))
    print(f"counting down, adapters only: loss {losses[0]:.3f} -> {losses[-1]:.3f}")
