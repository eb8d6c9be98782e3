"""Heads of Hugging Face's models that have the weight of an embedding, each tied in a way of its own."""

import pytest
import torch

from relfisher import RNGD, coverage

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 24,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
BART = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 12))
}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))


def roberta():
    return transformers.RobertaForMaskedLM(transformers.RobertaConfig(**SIZES))


def bart():
    sizes = {"vocab_size": 24, "d_model": 8, "max_position_embeddings": 16, "pad_token_id": 1} | BART
    return transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, scale_embedding=True))


def gemma():
    return transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, num_key_value_heads=2, head_dim=4))


@pytest.mark.parametrize(
    ("make", "head", "weight"),
    [
        (bert, "cls.predictions.decoder", "bert.embeddings.word_embeddings.weight"),
        (roberta, "lm_head.decoder", "roberta.embeddings.word_embeddings.weight"),
        (bart, "lm_head", "model.shared.weight"),
        (gemma, "lm_head", "model.embed_tokens.weight"),
    ],
)
def test_a_tied_head_moves_in_its_metric_and_learns(make, head, weight):
    model = make()
    tokens = torch.randint(4, 24, (4, 9))
    found = {row.name: row for row in coverage(model, {"input_ids": tokens})}
    assert (found[weight].by, found[weight].subsystem) == ("metric", head)
    optimizer, losses = RNGD(model), []
    for _ in range(25):
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert "exp_avg" not in optimizer.state[dict(model.named_parameters())[weight]]
    assert losses[-1] < 0.9 * losses[0]
