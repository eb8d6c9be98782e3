"""A small GPT-2 under Hugging Face's Trainer learns to count in steps of 1, 2 or 3: `python examples/hf_gpt2.py`."""

from typing import Any

import torch
from synthetic import progressions
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from relfisher import RNGD, AdamWOptions


def gpt2() -> GPT2LMHeadModel:
    """Return a randomly initialized GPT-2 of two layers of width 32, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32,
        n_positions=16,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sequences(samples: int = 512, **options: Any) -> list[dict[str, Tensor]]:
    """Return progressions in the form that a language model is trained on."""
    return [{"input_ids": tokens, "labels": tokens} for tokens in progressions(samples, **options)]


def arguments(folder: str, **options: Any) -> TrainingArguments:
    """Return the settings of a short run on the CPU."""
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 32,
        "lr_scheduler_type": "cosine",
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return TrainingArguments(folder, **settings | options)


if __name__ == "__main__":
    model = gpt2()
    # Trainer creates the scheduler itself if none is given.
    trainer = Trainer(
        model,
        arguments("runs/hf_gpt2", num_train_epochs=20),
        train_dataset=sequences(),
        optimizers=(RNGD(model, fallback=AdamWOptions(lr=1e-2)), None),
    )
    trainer.train()
