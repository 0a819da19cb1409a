"""Text: class names -> prompts -> embeddings, computed once and kept as a buffer of the model.

Neither training on a checkpoint nor inference needs a text tower: it lives inside :func:`embed_names` alone.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from fusekern.config import TextConfig
from fusekern.errors import FusekernError
from fusekern.models.pickles import refuse_pickle

log = logging.getLogger(__name__)

_LOCAL_DIR = "local-dir:"
_OFFLINE = (
    "Without network give `text.model: local-dir:FOLDER` (open_clip_config.json and open_clip_model.safetensors), a "
    "weights file as `text.pretrained`, or ready embeddings with `text.source: file`"
)


@dataclass(frozen=True)
class TextEmbeddings:
    """One vector per class name.

    Attributes:
        names: the K class names, in the order of the data set.
        vectors: `[K, D]`, float32, unit rows.
        source: where they come from, in words.
        language_prior: false where the vectors know nothing of language.
    """

    names: tuple[str, ...]
    vectors: Tensor
    source: str
    language_prior: bool

    def describe(self) -> str:
        """The line for logs and reports: a score without a language prior is never shown without saying so."""
        return self.source if self.language_prior else f"{self.source} (no language prior)"


def embed_names(names: Sequence[str], config: TextConfig) -> TextEmbeddings:
    """Embed class names with the configured source.

    Args:
        names: K class names.
        config: source and its settings.

    Returns:
        embeddings `[K, D]`, float32, unit rows.

    Raises:
        FusekernError: a file or model that cannot be used, a name without embedding, a prompt without ``{}``.
    """
    names = tuple(names)
    if config.source == "hash":
        return TextEmbeddings(names, _hash_vectors(names, config.width), "hash vectors", language_prior=False)
    if config.source == "file":
        vectors = _unit_rows(_file_rows(names, config), names, config.file)
        return TextEmbeddings(names, vectors, f"file {Path(config.file).name}", language_prior=True)
    vectors = _unit_rows(_encode(names, config), names, config.model)
    tag = "" if config.model.startswith(_LOCAL_DIR) else f" {config.pretrained}"
    return TextEmbeddings(names, vectors, f"open_clip {config.model}{tag}, prompt {config.prompt!r}", True)


def text_width(config: TextConfig) -> int:
    """Width D of the embeddings that :func:`embed_names` will give; needs neither network nor text tower.

    Raises:
        FusekernError: the file or model configuration cannot be read.
    """
    if config.source == "hash":
        return config.width
    if config.source == "file":
        return _read_rows(config.file).shape[1]
    if config.model.startswith(_LOCAL_DIR):
        path = Path(config.model.removeprefix(_LOCAL_DIR)) / "open_clip_config.json"
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["model_cfg"]["embed_dim"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FusekernError(f"text.model: {path} gives no model_cfg.embed_dim ({error!r})") from error
    open_clip = _open_clip()
    _check_model_name(open_clip, config.model)
    return open_clip.get_model_config(config.model)["embed_dim"]


def mean_token_cosine(text: Tensor) -> Tensor:
    """Mean cosine between different tokens of an image: near 1 the tokens have collapsed into one direction.

    Args:
        text: `[B, K, C]`, any float type.

    Returns:
        scalar, float32, without gradient; 1 for K = 1 (one token is parallel to itself).
    """
    unit = torch.nn.functional.normalize(text.detach().float(), dim=-1)
    k = unit.shape[1]
    if k == 1:
        return unit.new_ones(())
    pairs = unit.sum(1).square().sum(-1) - k
    return (pairs / (k * (k - 1))).mean()


def _hash_vectors(names: tuple[str, ...], width: int) -> Tensor:
    # A sum of seven bytes is close to normal and, centred and doubled, odd: never zero. Integers, one square root and
    # one division are exact: the same bits on every machine, which a logarithm and a cosine would not promise.
    digests = b"".join(hashlib.shake_256(name.encode()).digest(7 * width) for name in names)
    values = 2 * np.frombuffer(digests, np.uint8).reshape(len(names), width, 7).sum(-1, dtype=np.int64) - 7 * 255
    lengths = np.sqrt((values * values).sum(-1, keepdims=True))
    return torch.from_numpy((values / lengths).astype(np.float32))


def _unit_rows(rows: Tensor, labels: Sequence[str], source: str) -> Tensor:
    rows = rows.float()
    lengths = rows.norm(dim=-1, keepdim=True)
    bad = [labels[i] for i in (~(lengths[:, 0].isfinite() & (lengths[:, 0] > 0))).nonzero()[:, 0].tolist()]
    if bad:
        raise FusekernError(f"text: {len(bad)} rows of {source} are zero or not finite: {', '.join(bad[:5])}")
    return rows / lengths


def _read_rows(file: str | None) -> Tensor:
    if file is None:
        raise FusekernError("text.file: needed for `text.source: file` (.npy or .safetensors, one row per name)")
    path = Path(file)
    if not path.is_file():
        raise FusekernError(f"text.file: {file} not found")
    try:
        if path.suffix == ".npy":
            rows = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
            if len(tensors) != 1:
                raise FusekernError(f"text.file: {file} must hold one tensor, found {sorted(tensors)}")
            rows = next(iter(tensors.values()))
        else:
            raise FusekernError(f"text.file: {file} must end in .npy or .safetensors")
    except FusekernError:
        raise
    except Exception as error:  # safetensors has an exception type of its own, numpy several
        raise FusekernError(f"text.file: {file} cannot be read without pickle: {error}") from error
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise FusekernError(f"text.file: {file} must have shape [names, width], found {list(rows.shape)}")
    return rows


def _file_rows(names: tuple[str, ...], config: TextConfig) -> Tensor:
    """Rows of the file by name, so that one file serves every data set whose names it has."""
    rows = _read_rows(config.file)
    if config.names is None:
        raise FusekernError(f"text.names: needed beside text.file {config.file} (one name a line, in the rows' order)")
    try:
        known = [line.strip() for line in Path(config.names).read_text(encoding="utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise FusekernError(f"text.names: {config.names} cannot be read: {error}") from error
    if len(known) != len(rows):
        raise FusekernError(f"text.names: {config.names} has {len(known)} names, {config.file} has {len(rows)} rows")
    twice = sorted({name for name in names if known.count(name) > 1})
    if twice:
        raise FusekernError(f"text.names: {config.names} has more than one row for {', '.join(twice)}")
    missing = [name for name in names if name not in known]
    if missing:
        hints = []
        for name in missing:
            nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            hints.append(f"{name!r} (nearest: {', '.join(map(repr, nearest)) or 'none'})")
        raise FusekernError(
            f"text.names: {config.names} lacks {len(missing)} of {len(names)} class names: {'; '.join(hints)}"
        )
    return rows[[known.index(name) for name in names]]


def _open_clip():
    try:
        import open_clip
    except ImportError as error:
        raise FusekernError(f"text.source: open_clip needs open_clip_torch (install fusekern[seg]): {error}") from error
    return open_clip


def _check_model_name(open_clip, model: str) -> None:
    if model not in open_clip.list_models():
        nearest = difflib.get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        raise FusekernError(f"text.model: open_clip has no {model!r}; nearest: {', '.join(nearest) or 'none'}")


@torch.no_grad()
def _encode(names: tuple[str, ...], config: TextConfig) -> Tensor:
    """`[K, D]` from the text tower, float32; the tower is gone when this returns."""
    if "{}" not in config.prompt:
        raise FusekernError(f"text.prompt: {config.prompt!r} must contain {{}} for the class name")
    open_clip = _open_clip()
    arguments = {} if config.model.startswith(_LOCAL_DIR) else _pretrained_arguments(open_clip, config)
    try:
        tower = open_clip.create_model(config.model, require_pretrained=True, weights_only=True, **arguments).eval()
        tokenizer = open_clip.get_tokenizer(config.model)
    except Exception as error:  # what a failed download raises differs between versions of the hub client
        raise FusekernError(f"text.model: open_clip cannot load {config.model}: {error}. {_OFFLINE}") from error
    prompts = [config.prompt.replace("{}", name) for name in names]
    tokens = tokenizer(prompts)
    # One more place changes a prompt's tokens only where the tokenizer had cut it.
    longer = tokenizer(prompts, context_length=tokens.shape[1] + 1)[:, :-1]
    for i in (longer != tokens).any(1).nonzero()[:, 0].tolist():
        log.warning("prompt cut to %d tokens: %r", tokens.shape[1], prompts[i])
    return torch.cat([tower.encode_text(batch) for batch in tokens.split(256)])


def _pretrained_arguments(open_clip, config: TextConfig) -> dict:
    """Weights and activation: OpenAI's towers use QuickGELU, which open_clip only warns about when asked by tag."""
    _check_model_name(open_clip, config.model)
    if Path(config.pretrained).is_file():
        refuse_pickle(Path(config.pretrained))
        if f"{config.model}-quickgelu" in open_clip.list_models():
            log.warning(
                "text.pretrained is a file: weights that OpenAI trained need text.model %s-quickgelu", config.model
            )
        return {"pretrained": config.pretrained}
    tags = open_clip.list_pretrained_tags_by_model(config.model)
    if config.pretrained not in tags:
        raise FusekernError(
            f"text.pretrained: {config.pretrained!r} is neither a file nor a tag of {config.model}; "
            f"tags: {', '.join(tags)}. {_OFFLINE}"
        )
    settings = open_clip.get_pretrained_cfg(config.model, config.pretrained)
    return {"pretrained": config.pretrained, "force_quick_gelu": bool(settings.get("quick_gelu"))}
