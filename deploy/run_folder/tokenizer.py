"""The run's tokenizer: made once, and what every later stage reads its tokens by.

The recipe says how to make it (`tokenizer.path`, or `vocab_size` and `words` on the demonstrations)
and is asked again at each stage. As long as no result depends on ``tokenizer.json``, another answer
makes another tokenizer; afterwards it is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from common.config.run import RunConfig
from common.data.records import read_demonstrations
from common.data.tokenizer import Tokenizer
from common.errors import ConfigError, DataError
from deploy.run_folder.fingerprints import Facts, difference
from deploy.run_folder.inputs import RunInputs, StageFacts, changed_settings, settings_of
from deploy.run_folder.reads import Reads

_STAGE = "tokenizer"


def run_tokenizer(run_dir: Path, config: RunConfig, lock: Callable[[], None]) -> Tokenizer:
    """Load the run's tokenizer, or make it where there is none; `lock` comes before any writing.

    Raises:
        ConfigError: the recipe asks for another one than results of this run depend on.
        DataError: it was exchanged beneath them, or what it is made from cannot be read.
    """
    inputs = RunInputs(run_dir)
    path = inputs.folder.tokenizer
    if not path.exists():
        return _make(inputs, config, lock)
    tokenizer, recorded = Tokenizer.load(path), inputs.stages.get(_STAGE)
    standing = inputs.standing()
    if recorded is not None:
        name = inputs.folder.name_of(path)
        what = difference(name, recorded.writes[name], [inputs.look(path)])
        if what and standing:
            raise DataError(f"{run_dir}: {what} since it was made; put back what it was")
        recorded = None if what else recorded
    if another := _another(inputs, config, tokenizer, recorded):
        ours = config.tokenizer.path is not None or (recorded is not None and recorded.reads)
        if standing or not ours:
            raise ConfigError(
                f"{run_dir}: has a tokenizer already, and the recipe asks for another one: "
                f"{another}; take that back, or give the new run another name"
            )
        return _make(inputs, config, lock)
    if recorded is None:  # a run of an earlier version, or one that was given its tokenizer
        lock()
        _record(inputs, config, {})
    return tokenizer


def _another(
    inputs: RunInputs, config: RunConfig, tokenizer: Tokenizer, recorded: StageFacts | None
) -> str:
    """Say how the tokenizer of the recipe differs from the run's; empty if it does not."""
    path = config.tokenizer.path
    if path is not None:
        wanted = Tokenizer.load(path)
        if wanted.fingerprint() == tokenizer.fingerprint():
            return ""
        old, new = (f"{t.vocab_size} tokens, {t.fingerprint()[:12]}" for t in (tokenizer, wanted))
        return f"tokenizer.path {path} holds other contents ({old} -> {new})"
    if recorded is None or "tokenizer.path" in recorded.reads:
        return ""
    if differing := changed_settings(recorded.settings, settings_of(_STAGE, config)):
        return "; ".join(differing)
    if inputs.standing() or not recorded.reads or not config.data.demonstrations:
        return ""  # a stage compares the demonstrations that it reads itself
    name = "data.demonstrations"
    return difference(name, recorded.reads[name], inputs.look_all(_reads(config))[name])


def _make(inputs: RunInputs, config: RunConfig, lock: Callable[[], None]) -> Tokenizer:
    lock()
    reads = inputs.look_all(_reads(config))
    if config.tokenizer.path is not None:
        tokenizer = Tokenizer.load(config.tokenizer.path)
    else:
        if not config.data.demonstrations:
            raise ConfigError(
                "data.demonstrations is empty; training a tokenizer needs at least one file"
            )
        demonstrations = read_demonstrations(config.data.demonstrations)
        texts = (d.prompt + d.response for d in demonstrations)
        tokenizer = Tokenizer.train(texts, config.tokenizer.vocab_size, config.tokenizer.words)
    tokenizer.save(inputs.folder.tokenizer)
    _record(inputs, config, reads)
    return tokenizer


def _record(inputs: RunInputs, config: RunConfig, reads: Facts) -> None:
    inputs.begin(_STAGE, config, reads)
    inputs.end(_STAGE, [inputs.folder.tokenizer])


def _reads(config: RunConfig) -> Reads:
    if config.tokenizer.path is not None:
        return {"tokenizer.path": [config.tokenizer.path]}
    return {"data.demonstrations": config.data.demonstrations}
