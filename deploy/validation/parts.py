"""Everything that a recipe names beside its data: functions, endpoints, tokenizer, checkpoints.

Nothing is changed, written or trained here. The user's modules are imported, and an endpoint is
asked for its headers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import httpx

from common.config.model import ModelConfig, PretrainedConfig
from common.config.rewards import EndpointComponent, FunctionComponent
from common.config.run import RunConfig
from common.data.own_tokenizer import OwnTokenizer
from common.data.records import Demonstration
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import CheckpointError, ConfigError
from common.files import one_line
from common.run_folder import writer_of
from deploy.validation.data import FieldFacts
from deploy.validation.findings import Findings
from reward_service.http_settings import certificates, require_url, token_of
from reward_service.proxies import proxy_of
from reward_service.scorers import FunctionScorer

_ANSWER_S = 2.0
"""Longest wait for an endpoint."""


def elsewhere(config: RunConfig) -> bool:
    """Whether workers may run on other machines, whose modules and environment are their own."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return address not in (None, "", "local")


def check_functions(config: RunConfig, findings: Findings) -> None:
    """Import reward functions and the judge, and see whether they can be called as they will be."""
    targets = {
        f"reward_service.components.{name}": (component.target, "reward function")
        for name, component in config.reward_service.components.items()
        if isinstance(component, FunctionComponent)
    }
    if config.evaluate.judge:
        targets["evaluate.judge"] = (config.evaluate.judge, "evaluate.judge")
    for field, (target, role) in targets.items():
        with findings.attempt(field):
            FunctionScorer(target, role=role, command=True).require_callable()


def check_endpoints(config: RunConfig, findings: Findings) -> None:
    """Look at the settings of remote components: URL, token, proxy, certificates."""
    for name, component in _endpoints(config):
        checks: list[tuple[Callable[[str], object], str]] = [
            (require_url, component.target),
            (token_of, component.token_env),
            (_require_folder, component.dead_letters),
        ]
        for check, value in checks:
            try:
                if value:
                    check(value)
            except ConfigError as error:
                findings.error(f"reward_service.components.{name}: {error}")


class Reach:
    """Asks all endpoints at once whether they are there, while other things are checked."""

    def __init__(self, config: RunConfig) -> None:
        self._pool = ThreadPoolExecutor(max_workers=8)
        self._asked: list[tuple[str, Future[str]]] = [
            (f"reward_service.components.{name}", self._pool.submit(_unreachable, component))
            for name, component in _endpoints(config)
        ]

    def note(self, findings: Findings) -> None:
        """Wait for the answers, and note those that did not come."""
        for field, answer in self._asked:
            if why := answer.result():
                findings.error(f"{field}: {why}")
        self._pool.shutdown()


def _unreachable(component: EndpointComponent) -> str:
    """Return why an endpoint cannot be asked; empty where it answers, whatever it says."""
    try:
        require_url(component.target)
        with httpx.Client(
            timeout=_ANSWER_S,
            trust_env=False,
            proxy=proxy_of(httpx.URL(component.target)),
            verify=certificates(component.target),
        ) as client:
            client.head(component.target)
    except ConfigError:
        return ""  # said by `check_endpoints`
    except httpx.HTTPError as error:
        return (
            f"{component.target} does not answer ({type(error).__name__}: {one_line(error)}); "
            "start it, or correct the address"
        )
    return ""


def _endpoints(config: RunConfig) -> list[tuple[str, EndpointComponent]]:
    components = config.reward_service.components.items()
    return [(name, each) for name, each in components if isinstance(each, EndpointComponent)]


def _require_folder(path: str) -> None:
    folder = Path(path).absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"dead letters cannot be written to {path}; name another file")


# ------------------------------------------------------------------ tokenizer and checkpoints


def check_tokenizer(
    config: RunConfig, shown: FieldFacts | None, findings: Findings
) -> Tokenizer | None:
    """Return the tokenizer that the run has or will have, by the recipe; None where it has none.

    One that would be trained is trained here on the first demonstrations, and not kept.
    """
    settings, start = config.tokenizer, None
    if isinstance(config.model, PretrainedConfig):
        start = config.model.start
    given = settings.path or start
    own = config.folder.tokenizer
    tokenizer: Tokenizer | None = None
    with findings.attempt():
        if given is not None:
            tokenizer = load_tokenizer(given, settings.chat_template)
        elif settings.chat_template is not None:
            findings.error(
                "tokenizer.chat_template: a tokenizer that is trained here has no control tokens "
                "to write; chat needs a pretrained model (model.start)"
            )
        if given is None and own.exists():
            tokenizer = load_tokenizer(own)
        elif given is None and shown is not None and shown.records:
            texts = (r.prompt + r.response for r in shown.records if isinstance(r, Demonstration))
            few = islice(texts, 5_000)
            tokenizer = OwnTokenizer.train(few, settings.vocab_size, settings.words)
    return tokenizer


def misfits(config: RunConfig, vocab_size: int) -> list[str]:
    """Return what of a recipe does not go with a tokenizer of so many tokens."""
    wrong = []
    if config.model.vocab_size not in (0, vocab_size):
        wrong.append(
            f"model.vocab_size={config.model.vocab_size}, but the tokenizer has {vocab_size} "
            "tokens; set it to 0 to take the tokenizer's"
        )
    if unknown := [token for token in config.rollout.stop_ids if token >= vocab_size]:
        wrong.append(
            f"rollout.stop_ids: {unknown[0]} is no token; the tokenizer has {vocab_size}, from 0"
        )
    return wrong


def check_checkpoints(config: RunConfig, findings: Findings) -> RunConfig:
    """Look into every pretrained model's folder: configuration, headers, family, context.

    Returns the recipe without those models beside the policy's that cannot be used.
    """
    context = config.model.context
    start = config.sft.start
    if start is not None and not Path(start).exists():
        text = f"sft.start: {start}: no such weights; {writer_of(Path(start))}"
        findings.error(text, CheckpointError)
    _is_usable("model.start", config.model, context, findings)
    for section, name, least in (
        ("reward_model", "model", 0),
        ("train", "critic", context),
        ("reward_service", "reference", context),
    ):
        settings = getattr(config, section)
        if not _is_usable(f"{section}.{name}.start", getattr(settings, name), least, findings):
            without = settings.model_copy(update={name: None})
            config = config.model_copy(update={section: without})
    return config


def _is_usable(field: str, model: ModelConfig | None, least: int, findings: Findings) -> bool:
    if not isinstance(model, PretrainedConfig):
        return True
    before, folder = len(findings.found), Path(model.start)
    if not folder.is_dir():
        text = f"{field}: {folder} is no folder; make it by `talipot import SOURCE {folder}`"
        findings.error(text, CheckpointError)
        return False
    # Imports a large library, which recipes without a checkpoint do not pay for.
    from common.models.pretrained.checkpoint import Checkpoint
    from common.models.pretrained.families import read_shape, sizes_of

    with findings.attempt():
        Checkpoint.open(folder)
        sizes_of(read_shape(folder), max(model.context, least), folder)
    return len(findings.found) == before
