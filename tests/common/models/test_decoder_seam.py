"""An architecture that exists only here: trained in a network, sampled from by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from actors.generation.engine import GenerationEngine
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.errors import ConfigError
from common.logprobs import Sampling
from common.models.attention import Attention
from common.models.decoder import Decoder, Sizes
from common.models.filling import Weights, held
from common.models.lora import Adapted, RowSelection
from common.models.networks import PolicyNetwork
from tests.likelihoods import chosen_logprobs

SIZES = Sizes(dim=16, context=24, layers=1, heads=4, kv_heads=2, head_dim=4)


class Toy(Decoder):
    """One layer of attention with two groups of heads and learned positions."""

    def __init__(self) -> None:
        super().__init__(SIZES)
        self.tokens, self.places = nn.Embedding(19, 16), nn.Embedding(24, 16)
        self.qkv = Adapted(16, {"q": 16, "k": 8, "v": 8})
        self.head = nn.Linear(16, 19)

    def first_weights(self, seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            yield name, held(torch.empty(parameter.shape).normal_(std=0.3, generator=generator))

    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        x = self.tokens(tokens) + self.places(positions)
        heads = self.qkv(x, adapter).unflatten(-1, (-1, 4))
        q, k, v = heads.split((4, 2, 2), dim=-2)
        mixed: Tensor = x + attention(0, q, k, v).flatten(-2)
        return mixed

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits.float()


def test_an_architecture_of_its_own_is_trained_and_sampled_from() -> None:
    network, tokens = PolicyNetwork(Toy()), torch.arange(18).view(2, 9)
    network.initialise(0)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        logits, values = network(tokens)
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        (loss + values.square().mean()).backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[1] < losses[0]
    decoder = network.decoder.eval().requires_grad_(False)
    with pytest.raises(ConfigError, match=r"native kernels do not run .*: a Toy is"):
        GenerationEngine(
            decoder, eos_ids=(-1,), sampling=Sampling(), max_tokens=8, slots=3, kernels="native"
        )
    engine = GenerationEngine(decoder, eos_ids=(-1,), sampling=Sampling(), max_tokens=8, slots=3)
    prompts = [EncodedPrompt(uid=f"{i}", text="x", ids=[*range(1, i + 2)]) for i in range(9)]
    requests = evaluation_requests(prompts, seed=0, label="toy")
    for request, response in zip(requests, engine.generate(requests), strict=True):
        whole = torch.tensor([request.prompt_ids + response.response_ids])
        logits = decoder(whole)[:, len(request.prompt_ids) - 1 : -1]
        expected = chosen_logprobs(logits, torch.tensor([response.response_ids]), Sampling())
        found = torch.tensor([response.logprobs])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
