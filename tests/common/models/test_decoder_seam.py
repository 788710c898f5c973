"""An architecture that exists only here: trained in a network, sampled from by torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from actors.generation.engine import GenerationEngine
from common.data.prompts import EncodedPrompt, evaluation_requests
from common.logprobs import Sampling
from common.models.decoder import Attention, Decoder, Sizes
from common.models.lora import Adapted, RowSelection
from common.models.networks import PolicyNetwork
from tests.likelihoods import chosen_logprobs

VOCABULARY, DIM, HEADS, KV_HEADS, WIDTH = 19, 16, 4, 2, 4


class Toy(Decoder):
    """One layer of attention with two groups of heads and learned positions."""

    def __init__(self) -> None:
        super().__init__(
            Sizes(
                vocabulary=VOCABULARY,
                dim=DIM,
                context=24,
                layers=1,
                heads=HEADS,
                kv_heads=KV_HEADS,
                head_dim=WIDTH,
            )
        )
        self.tokens, self.places = nn.Embedding(VOCABULARY, DIM), nn.Embedding(24, DIM)
        self.qkv = Adapted(DIM, {"q": HEADS * WIDTH, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH})
        self.head = nn.Linear(DIM, VOCABULARY)

    def initialise(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)

    def states(
        self, tokens: Tensor, positions: Tensor, attention: Attention, adapter: RowSelection
    ) -> Tensor:
        x = self.tokens(tokens) + self.places(positions)
        heads = self.qkv(x, adapter).unflatten(-1, (-1, WIDTH))
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS), dim=-2)
        mixed: Tensor = x + attention(0, q, k, v).flatten(-2)
        return mixed

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self.head(hidden)
        return logits.float()


def test_an_architecture_of_its_own_is_trained_and_sampled_from() -> None:
    network, tokens = PolicyNetwork(Toy()), torch.arange(18).view(2, 9) % VOCABULARY
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
    engine = GenerationEngine(decoder, eos_id=-1, sampling=Sampling(), max_tokens=8, slots=3)
    prompts = [EncodedPrompt(uid=f"{i}", text="x", ids=[*range(1, i + 2)]) for i in range(9)]
    requests = evaluation_requests(prompts, seed=0, label="toy")
    for request, response in zip(requests, engine.generate(requests), strict=True):
        whole = torch.tensor([request.prompt_ids + response.response_ids])
        logits = decoder(whole)[:, len(request.prompt_ids) - 1 : -1]
        expected = chosen_logprobs(logits, torch.tensor([response.response_ids]), Sampling())
        found = torch.tensor([response.logprobs])
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
