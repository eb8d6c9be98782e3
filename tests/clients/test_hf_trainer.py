"""Hugging Face's Trainer: GPT-2 and BERT, schedulers, accumulation, bfloat16, and checkpoints that resume exactly."""

import pytest

from relfisher import AdamWOptions

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch
from builders import assert_close_weights, assert_same_weights
from hf_gpt2 import arguments, gpt2, sequences
from synthetic import topics
from transformers import BertConfig, BertForSequenceClassification, Trainer, get_linear_schedule_with_warmup

from relfisher import RNGD

# transformers and torch say of each other what they will rename.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def bert(dropout=0.1):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(config)


def classified(samples):
    return [{"input_ids": tokens, "labels": label} for tokens, label in zip(*topics(samples), strict=True)]


CASES = {"gpt2": (gpt2, sequences), "bert": (bert, classified)}


def train(model, data, folder, *, resume=None, warmup=None, **options):
    optimizer = RNGD(model, lr=5e-2, fallback=AdamWOptions(lr=1e-2))
    scheduler = warmup and get_linear_schedule_with_warmup(optimizer, warmup, options["max_steps"])
    trainer = Trainer(model, arguments(folder, **options), train_dataset=data, optimizers=(optimizer, scheduler))
    trainer.train(resume_from_checkpoint=resume)
    assert optimizer.health.skipped_steps == 0
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_it_learns(case, bf16, tmp_path):
    """GPT-2 with a scheduler that Trainer makes, BERT with one of its own."""
    build, data = CASES[case]
    options = {"warmup": 5} if case == "bert" else {"lr_scheduler_type": "cosine"}
    losses = train(
        build(),
        data(240),
        tmp_path,
        max_steps=60,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        bf16=bf16,
        logging_steps=6,
        **options,
    )
    assert len(losses) == 10
    assert losses[-1] < losses[0] * 0.5


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(case, tmp_path):
    build, data = CASES[case]
    straight, resumed = build(), build()
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 8}
    train(straight, data(128), tmp_path, save_strategy="steps", save_steps=6, **options)
    train(resumed, data(128), tmp_path, resume=str(tmp_path / "checkpoint-6"), **options)
    assert_same_weights(straight, resumed)


def test_activation_checkpointing_changes_nothing(tmp_path):
    plain, saving = bert(dropout=0.0), bert(dropout=0.0)
    train(plain, classified(128), tmp_path, max_steps=6)
    train(saving, classified(128), tmp_path, max_steps=6, gradient_checkpointing=True)
    assert_close_weights(plain, saving)
