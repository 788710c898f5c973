"""The run's tokenizer: made once, and what every later stage reads its tokens by.

The recipe says which (`tokenizer.path`, the one of `model.start`, or one that is trained on the
demonstrations) and is asked again at each stage. As long as no result depends on the run's copy,
another answer makes another tokenizer; afterwards it is refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from common.config.model import PretrainedConfig
from common.config.run import RunConfig
from common.data.files.lists import files_at
from common.data.own_tokenizer import OwnTokenizer
from common.data.pretrained_files import kept_files
from common.data.pretrained_tokenizer import PretrainedTokenizer
from common.data.records import read_demonstrations
from common.data.tokenizer import Tokenizer, load_tokenizer
from common.errors import ConfigError, DataError
from deploy.run_folder.fingerprints import Facts, difference, files_in
from deploy.run_folder.inputs import RunInputs, StageFacts, changed_settings, settings_of
from deploy.run_folder.reads import Reads

_STAGE = "tokenizer"


def run_tokenizer(run_dir: Path, config: RunConfig, lock: Callable[[], None]) -> Tokenizer:
    """Load the run's tokenizer, or make it where there is none; `lock` comes before any writing.

    Raises:
        ConfigError: the recipe asks for another one than results of this run depend on.
        DataError: it was exchanged beneath them, or what it is made from cannot be read.
    """
    if config.reuse.tokenizer is not None:
        return _of_another_run(config)
    inputs = RunInputs(run_dir)
    path = inputs.folder.tokenizer
    if not path.exists():
        return _make(inputs, config, lock)
    tokenizer, recorded = load_tokenizer(path), inputs.stages.get(_STAGE)
    standing = inputs.standing()
    if recorded is not None:
        what = _exchanged(inputs, recorded)
        if what and standing:
            raise DataError(f"{run_dir}: {what} since it was made; put back what it was")
        recorded = None if what else recorded
    if another := _another(inputs, config, tokenizer, recorded):
        ours = _given(config) is not None or (recorded is not None and recorded.reads)
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


def _of_another_run(config: RunConfig) -> Tokenizer:
    """Load the tokenizer that is taken from another run; one that is given must be the same."""
    path = config.folder.tokenizer
    if not path.exists():
        raise DataError(
            f"reuse.tokenizer: {path}: no such tokenizer; put that run back where it was, or say "
            "where it is now with reuse.tokenizer=PATH"
        )
    tokenizer, given = load_tokenizer(path), _given(config)
    if given is not None:
        field, wanted = given
        if load_tokenizer(wanted, config.tokenizer.chat_template).fingerprint() != (
            tokenizer.fingerprint()
        ):
            raise ConfigError(
                f"{field} {wanted}: another tokenizer than that of reuse.tokenizer {path}; leave "
                "one of them out"
            )
    return tokenizer


def _given(config: RunConfig) -> tuple[str, str] | None:
    """Return field and path of the tokenizer that the recipe brings; None: it has one trained."""
    if config.tokenizer.path is not None:
        return "tokenizer.path", config.tokenizer.path
    if isinstance(config.model, PretrainedConfig):
        return "model.start", config.model.start
    return None


def _exchanged(inputs: RunInputs, recorded: StageFacts) -> str:
    """Say how the run's files differ from those that were made; empty if they do not."""
    folder = inputs.folder
    files = {folder.name_of(file): file for file in files_in(folder.tokenizer)}
    if strange := sorted(files.keys() ^ recorded.writes.keys()):
        return f"{strange[0]} was {'added' if strange[0] in files else 'taken away'}"
    changed = (
        difference(name, recorded.writes[name], [inputs.look(file)]) for name, file in files.items()
    )
    return next(filter(None, changed), "")


def _another(
    inputs: RunInputs, config: RunConfig, tokenizer: Tokenizer, recorded: StageFacts | None
) -> str:
    """Say how the tokenizer of the recipe differs from the run's; empty if it does not."""
    if (given := _given(config)) is not None:
        field, path = given
        wanted = load_tokenizer(path, config.tokenizer.chat_template)
        if wanted.fingerprint() == tokenizer.fingerprint():
            return ""
        old, new = (f"{t.vocab_size} tokens, {t.fingerprint()[:12]}" for t in (tokenizer, wanted))
        return f"{field} {path} holds other contents ({old} -> {new})"
    _require_no_template(config)
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
    if (given := _given(config)) is not None:
        tokenizer = load_tokenizer(given[1], config.tokenizer.chat_template)
    else:
        _require_no_template(config)
        if not config.data.demonstrations:
            raise ConfigError(
                "data.demonstrations is empty; training a tokenizer needs at least one file"
            )
        demonstrations = read_demonstrations(config.data.demonstrations)
        texts = (d.prompt + d.response for d in demonstrations)
        tokenizer = OwnTokenizer.train(texts, config.tokenizer.vocab_size, config.tokenizer.words)
    folder, pretrained = inputs.folder, isinstance(tokenizer, PretrainedTokenizer)
    shutil.rmtree(folder.pretrained_tokenizer, ignore_errors=True)
    folder.own_tokenizer.unlink(missing_ok=True)
    tokenizer.save(folder.pretrained_tokenizer if pretrained else folder.own_tokenizer)
    _record(inputs, config, reads)
    return tokenizer


def _require_no_template(config: RunConfig) -> None:
    """Refuse a chat template for a tokenizer that is trained here."""
    if config.tokenizer.chat_template is not None:
        raise ConfigError(
            "tokenizer.chat_template: a tokenizer that is trained here has no control tokens to "
            "write; chat needs a pretrained model (model.start)"
        )


def _record(inputs: RunInputs, config: RunConfig, reads: Facts) -> None:
    inputs.begin(_STAGE, config, reads)
    inputs.end(_STAGE, files_in(inputs.folder.tokenizer))


def _reads(config: RunConfig) -> Reads:
    if (given := _given(config)) is None:
        return {"data.demonstrations": files_at(config.data.demonstrations)}
    field, path = given
    template = config.tokenizer.chat_template
    more = {} if template is None else {"tokenizer.chat_template": [template]}
    folder = Path(path)
    return {field: kept_files(folder) if folder.is_dir() else [path], **more}
