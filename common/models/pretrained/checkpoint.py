"""Pretrained checkpoints as folders in Hugging Face's layout, read strictly.

::

    config.json  generation_config.json  tokenizer*.json ...  chat_template.jinja
    model.safetensors, or model.safetensors.index.json and the shards that it names

What is wrong with a folder is known from its headers, before a tensor is loaded. Shards are read
one after the other, so that a model's weights are never in memory twice. Nothing is unpickled, no
code of a checkpoint's own is run, and nothing is fetched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from common.errors import CheckpointError
from common.files import one_line
from common.models.filling import Source, fill, stored
from common.models.pretrained.config_files import CONFIG, GENERATION, read_config, read_json
from common.models.pretrained.names import HEAD, module_name

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SCORE = "score.weight"
"""The head of a sequence-classification checkpoint, ``[labels, D]``."""

_EMBEDDINGS = (
    "model.embed_tokens.weight",
    "transformer.word_embeddings.weight",
    "gpt_neox.embed_in.weight",
)
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.\w+|attention\.(bias|masked_bias))$")
"""Tensors that older checkpoints store although they follow from the configuration."""
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER = re.compile(
    r"tokenizer[\w.-]*|[\w.-]*\.(model|tiktoken)|vocab\.(json|txt)|merges\.txt"
    r"|added_tokens\.json|special_tokens_map\.json|(additional_)?chat_templates?(\.\w+)?"
)
"""Names of files and folders that make a tokenizer, its chat templates among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFacts:
    """What a header says of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    """The shard that it lies in."""
    stored: str
    """Its name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint's folder, of which the configuration and the headers have been read."""

    path: Path
    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    """Its generation config; empty where it has none."""
    facts: Mapping[str, TensorFacts]
    """Every tensor by its name in the module of `transformers`."""
    tied: bool
    """The output head is the input embedding."""

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read a folder's configuration and headers.

        Raises:
            CheckpointError: no such folder; not a checkpoint; torn or incomplete.
            ConfigError: of a family or a variant that is not supported.
        """
        folder = Path(path)
        return cls.of(folder, read_config(folder))

    @classmethod
    def of(
        cls, folder: Path, config: Mapping[str, Any], facts: Mapping[str, TensorFacts] | None = None
    ) -> Checkpoint:
        """Take a folder for a checkpoint of another configuration than the one in it.

        Args:
            folder: where it is.
            config: what it is taken for.
            facts: the tensors that belong to that; None: all.

        Raises:
            CheckpointError: as `open`.
            ConfigError: as `open`.
        """
        # The library takes seconds to import, which models of our own do without.
        from common.models.pretrained.families import require_family

        require_family(config, folder / CONFIG)
        return cls(
            path=folder,
            config=config,
            generation=read_json(folder / GENERATION) or {},
            facts=read_facts(folder, str(config["model_type"])) if facts is None else facts,
            tied=bool(settings_of(config, folder).tie_word_embeddings),
        )

    @property
    def family(self) -> str:
        """Its `model_type`."""
        return str(self.config["model_type"])

    @property
    def parameters(self) -> int:
        """Number of parameters; a head that is the embedding counts once."""
        return sum(
            math.prod(fact.shape) for name, fact in self.facts.items() if name != self.tied_copy
        )

    @property
    def dtype(self) -> torch.dtype:
        """Number type of most of its parameters."""
        sizes: dict[torch.dtype, int] = {}
        for fact in self.facts.values():
            sizes[fact.dtype] = sizes.get(fact.dtype, 0) + math.prod(fact.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    @property
    def labels(self) -> int:
        """Labels of a sequence-classification checkpoint; 0 for a language model."""
        return self.facts[SCORE].shape[0] if SCORE in self.facts else 0

    @property
    def embedding(self) -> str:
        """Name of the input embedding."""
        return next((name for name in _EMBEDDINGS if name in self.facts), _EMBEDDINGS[0])

    @property
    def tied_copy(self) -> str:
        """Name of a stored head that the configuration ties to the embedding; empty: none."""
        name = f"{HEAD}weight"
        return name if name in self.facts and self.tied else ""

    @property
    def tokenizer_files(self) -> list[Path]:
        """Files of the tokenizer and its chat templates, inside the folder."""
        return [path for path in sorted(self.path.iterdir()) if TOKENIZER.fullmatch(path.name)]

    @property
    def weight_files(self) -> list[Path]:
        """The shards, and the index where there is one."""
        index = self.path / INDEX
        shards = sorted({fact.file for fact in self.facts.values()})
        return shards + ([index] if len(shards) > 1 or shards[0].name != WEIGHTS else [])

    @property
    def files(self) -> list[Path]:
        """Every file that what a model computes depends on, its tokenizer included."""
        settings = [self.path / name for name in (CONFIG, GENERATION)]
        present = [path for path in settings if path.exists()]
        nested = [
            inner
            for path in self.tokenizer_files
            for inner in (sorted(path.rglob("*")) if path.is_dir() else [path])
            if inner.is_file()
        ]
        return present + nested + self.weight_files

    def tensors(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors by name, shard by shard; `names` are those wanted, None all."""
        for file in sorted({fact.file for fact in self.facts.values()}):
            wanted = [
                (name, fact.stored)
                for name, fact in self.facts.items()
                if fact.file == file and (names is None or name in names)
            ]
            if wanted:
                with _shard(file) as shard:
                    for name, stored in wanted:
                        yield name, shard.get_tensor(stored)

    def require(self, module: nn.Module, without: Collection[str] = ()) -> None:
        """Refuse a module that does not have these tensors (it may be on the meta device).

        Args:
            module: with the names of `transformers`; adapters on it do not count.
            without: beginnings of names that may be missing on either side.

        Raises:
            CheckpointError: a tensor is missing, unexpected or of another shape; the first by name.
        """
        ours = _own(module)
        tied = _tied(ours)
        for name in sorted(ours.keys() | self.facts.keys()):
            needed = tuple(ours[name].shape) if name in ours else None
            given = self.facts[name].shape if name in self.facts else None
            if needed == given or name.startswith(tuple(without)):
                continue
            if needed is None and name == self.tied_copy:
                continue
            if given is None and name in tied and tied[name] in self.facts:
                continue
            raise CheckpointError(
                f"{self.path}: its weights are of another model than its {CONFIG}: '{name}' is "
                f"{given or 'absent'}, the model needs {needed or 'none of that name'}"
            )
        self._require_tied()

    def weights(self, module: nn.Module, without: Collection[str] = ()) -> dict[str, Source]:
        """Return where a module's weights are, in the order of the shards; arguments as `require`.

        Raises:
            CheckpointError: as `require`.
        """
        self.require(module, without)
        ours = _own(module)
        placed = sorted(self.facts.items(), key=lambda item: item[1].file)
        return {
            name: stored(fact.file, fact.stored, fact.shape)
            for name, fact in placed
            if name in ours
        }

    def load_into(self, module: nn.Module, without: Collection[str] = ()) -> None:
        """Copy the weights into a module, in its own number types; arguments as `require`.

        Raises:
            CheckpointError: as `require`.
        """
        fill(module, self.weights(module, without).items())

    def _require_tied(self) -> None:
        """Refuse a stored head that is not the embedding that it is tied to."""
        copy = self.tied_copy
        if not copy:
            return
        pair = dict(self.tensors({copy, self.embedding}))
        if not torch.equal(pair[copy], pair[self.embedding]):
            raise CheckpointError(
                f"{self.path}: '{copy}' differs from '{self.embedding}', to which {CONFIG} ties it "
                "(tie_word_embeddings); set that to false if the head is one of its own"
            )


def settings_of(config: Mapping[str, Any], where: object) -> Any:
    """Return a configuration as `transformers` has it, its defaults included.

    Raises:
        CheckpointError: a value that the family's class refuses.
    """
    # The library takes seconds to import, which models of our own do without.
    from transformers import CONFIG_MAPPING

    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(dict(config))
    except Exception as error:  # it checks with classes of its own
        raise CheckpointError(f"{where}: {CONFIG} cannot be used ({one_line(error)})") from None


def _own(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's tensors but for adapters; parameters themselves, so tied ones are equal."""
    state = module.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if ".lora_" not in f".{name}"}


def _tied(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Return names that are another name's tensor, with that name."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    for name, tensor in state.items():
        if id(tensor) in first:
            names[name] = first[id(tensor)]
            names[first[id(tensor)]] = name
        first.setdefault(id(tensor), name)
    return names


def _shard(file: Path) -> Any:
    """Open a safetensors file.

    Raises:
        CheckpointError: it is missing, cut off or something else.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: this shard is missing; bring the whole checkpoint")
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{file}: torn or not safetensors ({one_line(error)}); bring the file again"
        ) from None


def read_facts(folder: Path, family: str) -> dict[str, TensorFacts]:
    """Read the headers of all shards."""
    found: dict[str, TensorFacts] = {}
    for file, listed in _shards(folder).items():
        with _shard(file) as shard:
            present = set(shard.keys())
            if listed is not None and (strange := sorted(present ^ listed)):
                there = "has" if strange[0] in present else "does not have"
                raise CheckpointError(
                    f"{file}: a shard of another model: it {there} '{strange[0]}', and {INDEX} "
                    "says otherwise; bring the whole checkpoint"
                )
            for stored in sorted(present):
                if _DERIVED.search(stored):
                    continue
                part = shard.get_slice(stored)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise CheckpointError(
                        f"{file}: '{stored}' is stored as {part.get_dtype()}; quantized weights "
                        "cannot be trained: bring the checkpoint in bf16, fp16 or fp32"
                    )
                name = module_name(family, stored)
                found[name] = TensorFacts(
                    shape=tuple(part.get_shape()), dtype=dtype, file=file, stored=stored
                )
    if not found:
        raise CheckpointError(f"{folder}: no tensors in it; bring the whole checkpoint")
    return found


def _shards(folder: Path) -> dict[Path, set[str] | None]:
    """Return the shards and the names that the index lists in each; None: there is no index."""
    single = folder / WEIGHTS
    if single.is_file():
        return {single: None}
    index = read_json(folder / INDEX)
    if index is None:
        raise CheckpointError(_no_weights(folder))
    weights = index.get("weight_map")
    if not isinstance(weights, dict) or not all(
        isinstance(name, str) and Path(name).name == name for name in weights.values()
    ):
        raise CheckpointError(f"{folder / INDEX}: no weight_map from tensors to files beside it")
    shards: dict[Path, set[str] | None] = {}
    for name in sorted(set(weights.values())):
        shards[folder / name] = {tensor for tensor, file in weights.items() if file == name}
    return shards


def _no_weights(folder: Path) -> str:
    """Say what to do about a folder without safetensors."""
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        return f"{folder}: neither {WEIGHTS} nor {INDEX}; bring the whole checkpoint"
    return (
        f"{folder}: weights only as {pickled[0]}, and pickled files are not read; convert them "
        'where you trust them: python -c "from transformers import AutoModelForCausalLM as M; '
        f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" (and copy the "
        "tokenizer's files)"
    )
