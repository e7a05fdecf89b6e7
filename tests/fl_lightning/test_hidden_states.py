"""An encoder in two parts, without the package transformers: layers of its own kind."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fl_lightning.data import hidden_states as module
from fl_lightning.data.hidden_states import divided, hidden_states

COUNT = 3


class Layer(nn.Module):
    """Mixes the tokens that count, as attention does."""

    def __init__(self):
        super().__init__()
        self.dense = nn.Linear(6, 6)

    def forward(self, hidden_states, mask):
        weight = mask[..., None].to(hidden_states.dtype)
        mean = (hidden_states * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
        return torch.tanh(self.dense(hidden_states + mean))


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(20, 6)

    def forward(self, input_ids=None, inputs_embeds=None):
        return self.table(input_ids)


class Encoder(nn.Module):
    """With the names that encoders of transformers have."""

    config = SimpleNamespace(num_hidden_layers=COUNT, hidden_size=6, vocab_size=20)
    looks_again = False

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embeddings = Words()
        self.layer = nn.ModuleList(Layer() for _ in range(COUNT))
        self.pooler = nn.Linear(6, 6)

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        x = self.embeddings(input_ids=input_ids, inputs_embeds=inputs_embeds)
        for layer in self.layer:
            x = layer(x, attention_mask)
        if self.looks_again:
            x = x + self.layer[0].dense.weight.mean()
        return SimpleNamespace(last_hidden_state=x)


@pytest.fixture
def texts():
    ids = torch.randint(20, (70, 5), generator=torch.Generator().manual_seed(1))
    lengths = torch.arange(70) % 5 + 1
    return {"input_ids": ids, "attention_mask": (torch.arange(5) < lengths[:, None]).long()}


@pytest.mark.parametrize("count", range(1, COUNT))
def test_two_parts_are_the_whole(monkeypatch, texts, count):
    body = Encoder()
    monkeypatch.setattr(module, "pretrained_part", lambda *_, **__: body)
    seen = texts["attention_mask"] > 0
    with torch.no_grad():
        states = hidden_states(texts, model="any", frozen_layers=count)
        assert not states[~seen].any()
        lower, upper = divided(body, count)
        assert upper.pooler is None
        assert body.pooler is not None
        want = body(**texts).last_hidden_state
        have = upper(inputs_embeds=states, attention_mask=texts["attention_mask"])
        torch.testing.assert_close(have.last_hidden_state[seen], want[seen])
        # Only these layers are in each part, under their own names.
        names = {n for n, _ in upper.named_parameters()}
        assert names == {
            f"layer.{i}.dense.{p}" for i in range(count, COUNT) for p in ("weight", "bias")
        }
        assert not any(f"layer.{count}." in n for n, _ in lower.named_parameters())
    body.eval()
    divided(body, count)
    assert not body.training


@pytest.mark.parametrize("count", [0, COUNT])
def test_a_part_without_layers_is_refused(count):
    with pytest.raises(ValueError, match=f"frozen_layers={count} must be from 1 to {COUNT - 1}"):
        divided(Encoder(), count)


def test_an_encoder_that_is_no_two_parts_is_refused(monkeypatch):
    monkeypatch.setattr(Encoder, "looks_again", True)
    with pytest.raises(ValueError, match="first layers of Encoder cannot be computed apart"):
        divided(Encoder(), 1)


def test_records_that_are_no_texts_are_refused():
    with pytest.raises(ValueError, match="transform='hidden_states' needs"):
        hidden_states(torch.zeros(2, 3), model="any", frozen_layers=1)
