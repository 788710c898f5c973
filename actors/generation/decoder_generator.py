"""The generator over our own decoder: weights in one flat buffer, sampled from in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actors.generation.engine import GenerationEngine
from actors.generation.interface import Generated
from actors.generation.native_forward import NativeForward
from actors.generation.stops import Stops
from common.config.model import LoraConfig, ModelConfig
from common.config.workers import RolloutConfig
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.devices import Compute, torch_dtype
from common.logprobs import Sampling, sampling_of
from common.models.adapters import adapter_tensors, add_adapter, base_fingerprint
from common.models.build import build_decoder
from common.models.decoder import Decoder
from common.models.lora import OFF
from common.models.weight_files import load_decoder
from common.native.panels import Spent
from common.wire.trajectory import RolloutRequest
from common.wire.weights import FlatBuffer, Manifest, Payload


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterOnWire:
    """What is needed to sample from adapters, when only those are published."""

    name: str
    """Of the adapter on the wire."""
    lora: LoraConfig
    base: str
    """Weights of the supervised policy, which the adapters are trained on; a file that every node
    can read."""


def build_engine(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    *,
    merged: str | None = OFF,
    spent: Spent | None = None,
) -> GenerationEngine:
    """Build the engine that settings describe; `merged` and `spent` as in `GenerationEngine`.

    Raises:
        ConfigError: the cache does not hold one sequence, or native kernels cannot run this.
        ClusterError: native kernels were asked for and cannot be compiled.
    """
    return GenerationEngine(
        decoder,
        eos_ids=tokenizer.stop_ids,
        sampling=sampling_of(rollout, tokenizer.stop_ids),
        max_tokens=rollout.max_response_tokens,
        slots=min(rollout.slots, rollout.lease_size),
        prefill_tokens=rollout.prefill_tokens,
        stops=Stops(ids=rollout.stop_ids, strings=rollout.stop, decode=tokenizer.decode),
        kernels=rollout.kernels,
        merged=merged,
        cache_mb=rollout.cache_mb,
        spent=spent,
        graphs=rollout.graphs,
    )


class DecoderGenerator:
    """`Generator` over a decoder in this process."""

    deterministic = True

    def __init__(
        self,
        model: ModelConfig,
        tokenizer_path: str,
        rollout: RolloutConfig,
        adapted: AdapterOnWire | None,
        compute: Compute,
    ) -> None:
        """Build decoder and engine.

        Args:
            model: the decoder's shape.
            tokenizer_path: its tokenizer.
            rollout: sampling and sizes.
            adapted: weights on the wire are those of an adapter, on a base that stays here.
            compute: where the decoder is.

        Raises:
            ConfigError: as `build_engine`.
            ClusterError: as `build_engine`.
        """
        self.exact = rollout.precision == "fp32"
        dtype = torch_dtype(rollout.precision)
        decoder, base, on_wire = build_decoder(model), "", OFF
        if adapted is not None:
            on_wire = adapted.name
            load_decoder(decoder, Path(adapted.base))
            base = base_fingerprint(decoder.state_dict())
            add_adapter(decoder, on_wire, adapted.lora, seed=0)
        self.decoder = decoder.eval().requires_grad_(False).to(compute.device, dtype)
        wire = adapter_tensors(decoder, on_wire) if on_wire else decoder.named_parameters()
        self.buffer = FlatBuffer(wire, dtype, base, compute.device)
        self._tokenizer, self._rollout = load_tokenizer(tokenizer_path), rollout
        self._merges = adapted is None or rollout.lora == "merged"
        # An engine that keeps weights in a layout of its own has the only copy, but for the base
        # of adapters, which the next one is merged into.
        self._spent = self.buffer.give_back if adapted is None else None
        self._greedy = False
        self.engine = self._build(merged=on_wire if self._merges else None)

    def memory(self) -> dict[str, int]:
        """Return bytes of weights and cache, as `Forward.memory`, and of a base beside them."""
        forward = self.engine.cached.implementation
        held = forward.memory()
        if self._spent is None and isinstance(forward, NativeForward):
            held["weights"] += sum(p.numel() * p.element_size() for p in self.decoder.parameters())
        return held

    def hold(self, manifest: Manifest, payloads: Sequence[Payload]) -> str:
        """Copy the slices in, verify them, and return the fingerprint of what is stored."""
        self.engine.forget()
        fingerprint = self.buffer.load(manifest, payloads)
        self.engine.refresh()
        return fingerprint

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Generated]:
        """Sample one response per request; results in the requests' order.

        A single adapter of all requests is merged into the weights, if settings let it. Several
        adapters are computed beside the weights. Greedy requests are sampled apart.
        """
        made: dict[str, Generated] = {}
        for greedy in (False, True):
            if some := [request for request in requests if bool(request.greedy) == greedy]:
                made |= {g.rollout_id: g for g in self._alike(some, greedy=greedy)}
        return [made[request.rollout_id] for request in requests]

    def _alike(self, requests: Sequence[RolloutRequest], *, greedy: bool) -> list[Generated]:
        adapters = {request.adapter for request in requests}
        merged = adapters.pop() if self._merges and len(adapters) == 1 else None
        if self._spent is not None:
            merged = self.engine.merged  # Weights of another engine were given back.
        if merged != self.engine.merged:
            del self.engine  # Before the other is built: `rollout.cache_mb` is planned for one.
            self.engine = self._build(merged=merged)
            self._greedy = False
        if greedy != self._greedy:
            self.engine.sample_by(self._sampling(greedy=greedy))
            self._greedy = greedy
        return self.engine.generate(requests)

    def text(self, generated: Generated) -> str:
        """Return the response as text, without the stop string that ended it."""
        return self.engine.text(generated)

    def _build(self, *, merged: str | None) -> GenerationEngine:
        return build_engine(
            self.decoder, self._tokenizer, self._rollout, merged=merged, spent=self._spent
        )

    def _sampling(self, *, greedy: bool) -> Sampling:
        temperature = 0.0 if greedy else self._rollout.temperature
        rollout = self._rollout.model_copy(update={"temperature": temperature})
        return sampling_of(rollout, self._tokenizer.stop_ids)
